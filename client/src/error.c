/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <gmem.h>

#include "error.h"

static _Thread_local char last[512];

int gmem_fail(int err, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(last, sizeof(last), format, args);
	va_end(args);
	return err;
}

const char *gmem_last_error(void)
{
	return last;
}

const char *gmem_strerror(int err)
{
	static const struct {
		int number;
		const char *text;
	} meanings[] = {
		{ 0, "success" },
		{ EINVAL, "an argument is not valid" },
		{ ENOENT, "no gmemd, or nothing of that name" },
		{ ENODEV, "no such device" },
		{ ENOMEM, "more memory than there is" },
		{ ENOSPC, "no room on the device: what is there is pinned or acquired" },
		{ EBUSY, "in use" },
		{ EPERM, "not permitted to this session" },
		{ EPROTO, "gmemd speaks another protocol" },
		{ ENOTCONN, "not connected to gmemd" },
		{ ECONNRESET, "gmemd is gone" },
		{ ETIMEDOUT, "not complete within the time" },
		{ ETIME, "the kernel ran longer than its timeout" },
		{ EOWNERDEAD, "the device context's process has crashed" },
		{ ECANCELED, "the device context was closed" },
		{ ELIBACC, "the kernel's library can't be loaded" },
	};
	const char *text;

	if (err < 0 && err > -4096)
		err = -err;
	for (size_t i = 0; i < sizeof(meanings) / sizeof(meanings[0]); i++)
		if (meanings[i].number == err)
			return meanings[i].text;
	text = strerrordesc_np(err);
	return text ? text : "unknown error";
}

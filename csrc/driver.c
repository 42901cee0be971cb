/* SPDX-License-Identifier: Apache-2.0 */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <gmem/core.h>
#include <gmem/driver.h>
#include <gmem/keep.h>

extern const struct gmem_driver_ops gmem_simgpu_ops, gmem_zstd_ops, gmem_file_ops, gmem_remote_ops;

static const struct gmem_driver_ops *const builtin[] = { &gmem_simgpu_ops, &gmem_zstd_ops, &gmem_file_ops,
							&gmem_remote_ops };

const struct gmem_driver_ops *gmem_driver_builtin(const char *name)
{
	for (size_t i = 0; i < sizeof(builtin) / sizeof(builtin[0]); i++)
		if (!strcmp(builtin[i]->name, name))
			return builtin[i];
	return NULL;
}

static int parse_bytes(const char *text, uint64_t *ret)
{
	static const char suffixes[] = "KMGT";
	unsigned long long n;
	const char *at;
	char *end;

	errno = 0;
	n = strtoull(text, &end, 10);
	if (errno || end == text || !isdigit((unsigned char)text[0]))
		return -EINVAL;
	at = *end ? strchr(suffixes, toupper((unsigned char)*end)) : NULL;
	if (at) {
		unsigned shift = 10 * (unsigned)(at - suffixes + 1);

		if (n > UINT64_MAX >> shift)
			return -EINVAL;
		n <<= shift;
		end++;
		if (end[0] == 'i' && end[1] == 'B')
			end += 2;
		else if (end[0] == 'B')
			end++;
	}
	if (*end)
		return -EINVAL;
	*ret = n;
	return 0;
}

static int parse_bool(const char *text, uint64_t *ret)
{
	static const char *const yes[] = { "on", "true", "yes", "1" }, *const no[] = { "off", "false", "no", "0" };

	for (size_t i = 0; i < 4; i++)
		if (!strcmp(text, yes[i]) || !strcmp(text, no[i])) {
			*ret = !strcmp(text, yes[i]);
			return 0;
		}
	return -EINVAL;
}

int gmem_driver_keep_fd(const struct gmem_driver_config *config, const char *name, int fd)
{
	struct gmem_driver_keep *keep = config->keep;
	int err;

	if (!keep)
		return 0;
	if (strlen(name) >= sizeof(keep->names[0]) || keep->count == GMEM_DRIVER_FDS)
		return -EINVAL;
	err = gmem_keep_fd(keep->keep, fd, "driver.%d.%s", keep->hnid, name);
	if (!err)
		strcpy(keep->names[keep->count++], name);
	return err;
}

int gmem_driver_kept_fd(const struct gmem_driver_config *config, const char *name)
{
	struct gmem_driver_keep *keep = config->keep;
	int fd = -1;

	if (keep && strlen(name) < sizeof(keep->names[0]) && keep->count < GMEM_DRIVER_FDS)
		fd = gmem_keep_take(keep->keep, "driver.%d.%s", keep->hnid, name);
	if (fd >= 0) {
		strcpy(keep->names[keep->count++], name);
		keep->restored = true;
	}
	return fd;
}

void gmem_driver_forget(struct gmem_driver_keep *keep)
{
	for (int i = 0; keep && i < keep->count; i++)
		gmem_keep_forget(keep->keep, "driver.%d.%s", keep->hnid, keep->names[i]);
}

int gmem_driver_options(const struct gmem_driver_config *config, const struct gmem_driver_option *options, size_t count)
{
	for (size_t i = 0; i < config->count; i++) {
		size_t o = 0;
		int err;

		while (o < count && strcmp(options[o].key, config->keys[i]))
			o++;
		if (o == count) {
			snprintf(config->message, GMEM_MESSAGE_MAX, "%s: no such option", config->keys[i]);
			return -EINVAL;
		}
		if (options[o].text) {
			*options[o].text = config->values[i];
			continue;
		}
		err = options[o].boolean ? parse_bool(config->values[i], options[o].value) :
					   parse_bytes(config->values[i], options[o].value);
		if (err) {
			snprintf(config->message, GMEM_MESSAGE_MAX, "%s: \"%.64s\" is not %s", config->keys[i],
				 config->values[i], options[o].boolean ? "on or off" : "a number (48M, 2G, ...)");
			return err;
		}
	}
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <gmem/core.h>
#include <gmem/driver.h>
#include <gmem/keep.h>

extern const struct gmem_driver_ops gmem_simgpu_ops, gmem_zstd_ops, gmem_file_ops, gmem_remote_ops, gmem_cuda_ops;

static const struct gmem_driver_ops *const builtin[] = { &gmem_simgpu_ops, &gmem_zstd_ops, &gmem_file_ops,
							&gmem_remote_ops, &gmem_cuda_ops };

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

static int add_name_locked(struct gmem_driver_keep *keep, const char *name)
{
	if (strlen(name) >= GMEM_DRIVER_NAME)
		return -EINVAL;
	if (keep->count == keep->capacity) {
		size_t capacity = keep->capacity ? 2 * keep->capacity : 16;
		void *grown = realloc(keep->names, capacity * sizeof(*keep->names));

		if (!grown)
			return -ENOMEM;
		keep->names = grown;
		keep->capacity = capacity;
	}
	strcpy(keep->names[keep->count++], name);
	return 0;
}

int gmem_driver_keep_fd(const struct gmem_driver_config *config, const char *name, int fd)
{
	struct gmem_driver_keep *keep = config->keep;
	int err;

	if (!keep)
		return 0;
	gmem_mutex_lock(&keep->lock);
	err = add_name_locked(keep, name);
	if (!err) {
		err = gmem_keep_fd(keep->keep, fd, "driver.%d.%s", keep->hnid, name);
		keep->count -= err != 0;
	}
	gmem_mutex_unlock(&keep->lock);
	return err;
}

int gmem_driver_kept_fd(const struct gmem_driver_config *config, const char *name)
{
	struct gmem_driver_keep *keep = config->keep;
	int fd = -1;

	if (!keep)
		return -1;
	gmem_mutex_lock(&keep->lock);
	if (!add_name_locked(keep, name)) {
		fd = gmem_keep_take(keep->keep, "driver.%d.%s", keep->hnid, name);
		keep->restored |= fd >= 0;
		keep->count -= fd < 0;
	}
	gmem_mutex_unlock(&keep->lock);
	return fd;
}

void gmem_driver_drop_fd(const struct gmem_driver_config *config, const char *name)
{
	struct gmem_driver_keep *keep = config->keep;
	size_t i = 0;

	if (!keep)
		return;
	gmem_mutex_lock(&keep->lock);
	while (i < keep->count && strcmp(keep->names[i], name))
		i++;
	if (i < keep->count) {
		gmem_keep_forget(keep->keep, "driver.%d.%s", keep->hnid, name);
		memmove(keep->names[i], keep->names[--keep->count], sizeof(*keep->names));
	}
	gmem_mutex_unlock(&keep->lock);
}

void gmem_driver_forget(struct gmem_driver_keep *keep)
{
	for (size_t i = 0; keep && i < keep->count; i++)
		gmem_keep_forget(keep->keep, "driver.%d.%s", keep->hnid, keep->names[i]);
}

void gmem_driver_keep_init(struct gmem_driver_keep *driver, struct gmem_keep *keep, int hnid)
{
	*driver = (struct gmem_driver_keep){ .keep = keep, .hnid = hnid };
	gmem_mutex_init(&driver->lock, GMEM_RANK_DRIVER_KEEP);
}

void gmem_driver_keep_deinit(struct gmem_driver_keep *keep)
{
	if (!keep)
		return;
	gmem_mutex_deinit(&keep->lock);
	free(keep->names);
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

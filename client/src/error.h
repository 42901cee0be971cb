/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GMEM_CLIENT_ERROR_H
#define GMEM_CLIENT_ERROR_H

/* Sets the thread's gmem_last_error() and gives back err, which is negative. */
__attribute__((format(printf, 2, 3), visibility("default"))) int gmem_fail(int err, const char *format, ...);

#endif

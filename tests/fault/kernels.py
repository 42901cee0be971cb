# SPDX-License-Identifier: Apache-2.0
"""What the device contexts of the fault tests run."""


def add(array, value):
    array += value
    return int(array.sum())

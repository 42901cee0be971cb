# SPDX-License-Identifier: Apache-2.0
"""Drivers of devices: which there are (registry) and what one written in Python looks like (base)."""

from gmemd.drivers.base import Driver, Info, Usage

__all__ = ["Driver", "Info", "Usage"]

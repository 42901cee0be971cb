# SPDX-License-Identifier: Apache-2.0
"""gmemd: the daemon that keeps host and device memory of its clients as one pool behind one address space."""

__version__ = "0.1.0"

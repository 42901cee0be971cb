# SPDX-License-Identifier: Apache-2.0
"""Real workloads on memory that is too small for them: gmem beside the same job written by hand."""

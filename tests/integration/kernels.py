# SPDX-License-Identifier: Apache-2.0
"""Kernels of the tests, by module path."""

import ctypes

import numpy as np


class Node(ctypes.Structure):
    pass


Node._fields_ = [("value", ctypes.c_int64), ("left", ctypes.c_uint64), ("right", ctypes.c_uint64)]
NODE_BYTES = ctypes.sizeof(Node)


def node(address):
    return Node.from_address(address)


def walk_list(head, add):
    """Adds to each value of a list linked by `right`; how many there are and their sum before."""
    count = total = 0
    while head:
        here = node(head)
        count, total = count + 1, total + here.value
        here.value += add
        head = here.right
    return count, total


def insert(root, free, value):
    """Inserts a node at address `free` into a search tree."""
    node(free).value, node(free).left, node(free).right = value, 0, 0
    at = root
    while True:
        here = node(at)
        side = "left" if value < here.value else "right"
        if not getattr(here, side):
            setattr(here, side, free)
            return
        at = getattr(here, side)


def in_order(root):
    stack, out, at = [], [], root
    while stack or at:
        while at:
            stack.append(at)
            at = node(at).left
        at = stack.pop()
        out.append(node(at).value)
        at = node(at).right
    return out


def mirror(root):
    stack = [root]
    while stack:
        here = node(stack.pop())
        here.left, here.right = here.right, here.left
        stack += [child for child in (here.left, here.right) if child]


def scale(arrays, factor):
    for array in arrays.values():
        array *= factor
    return {name: float(array.sum()) for name, array in arrays.items()}


def add_to_own_words(words, index, rounds):
    """Each writer owns every 4th word."""
    for _ in range(rounds):
        words[:, index::4] += 1


class Unpicklable(Exception):
    def __init__(self):
        super().__init__("no way back")
        self.lock = (i for i in range(1))


def fail_unpicklable():
    raise Unpicklable


def sum_of(array):
    return np.asarray(array).sum()

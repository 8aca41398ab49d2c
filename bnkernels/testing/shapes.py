"""The shapes (N, C, *) of the grids, each with its reason. Cases may use any other shape."""

from __future__ import annotations

Shape = tuple[int, ...]

QUICK: tuple[Shape, ...] = (
    # 2-D: inner = 1, which is channels-last in memory
    (2, 4),  # n = 2: the minimum for training; the unbiased variance is twice the biased one
    (17, 3),  # all odd: no row is aligned
    (64, 100),  # C is not a power of two, and more than one warp of vectors but not a multiple
    (257, 1),  # one channel: a plain vector
    # 3-D
    (1, 6, 1031),  # N = 1 and a prime length: one long row, with a tail
    (3, 7, 31),  # rows shorter than a warp, each with a head and a tail
    (2, 1, 4096),  # C = 1, rows of whole vectors
    # 4-D
    (2, 8, 4, 4),  # a row is exactly one or two 16-byte vectors
    (4, 3, 5, 7),  # an image's three channels, 35 elements
    (16, 33, 1, 1),  # NC11: strides of both layouts agree
    (5, 1, 9, 9),  # N1HW: likewise
    (2, 100, 7, 7),  # 49 elements: 98 bytes in 16 bits, every row has another alignment
    (8, 64, 14, 14),  # ResNet-like, whole vectors
    (3, 130, 3, 11),  # 33 elements; channels-last tiles of 64 channels leave a remainder of 2
    # 5-D
    (2, 5, 2, 3, 5),  # odd everywhere
    (2, 16, 4, 6, 8),  # video-like
)

LARGE: tuple[Shape, ...] = (
    (65_537, 2),  # N over 2^16, beyond the limit of a grid dimension
    (131_071, 3),  # N over 131,070, where torch's kernels once failed
    (880_803, 1),  # N over 880,801, likewise
    (2, 65_537, 2),  # C over 2^16
    (1, 3, 250_007),  # the length that the tolerance was calibrated at
    (2, 64, 112, 112),  # ResNet-50, first layer
    (4, 256, 28, 28),
    (8, 512, 14, 14),
    (8, 2048, 7, 7),  # ResNet-50, last layer: small n, odd rows
    (70_001, 4, 3, 3),  # N over 2^16 with short rows
)

HUGE: tuple[Shape, ...] = (
    (65_537, 32, 32, 32),  # over 2^31 elements, and N over 2^16
    (2, 12, 9_500, 9_500),  # over 2^31 in 24 rows
    (3, 8_000_011, 90),  # over 2^31, in very many channels
)

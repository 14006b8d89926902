"""A torso as computed tomography shows it, in Hounsfield units, from the base of the lungs to the kidneys.

Coordinates are millimetres of the patient: z up, y to the front, x to the patient's right, zero at the level of the
diaphragm in the middle of the body. Array axes are (z, y, x) with ascending coordinates, so that the array is what a
reader makes of a NIfTI file in RAS orientation. Later shapes cover earlier ones: fat, chest wall, lungs, abdomen.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from perdure.data.phantoms.drawing import Floats, Scanner, Scene, blurred, rounded, smooth

SETS: Final[dict[str, tuple[str, ...]]] = {
    "organs": ("liver", "spleen", "kidneys"),
    "vessels": ("aorta", "vena_cava", "vertebrae"),
    "lesions": ("liver_lesion", "lungs"),
}
"""Classes that each set labels. The liver is labelled without its lesions, so that no voxel has two classes."""
CLASSES: Final = tuple(name for names in SETS.values() for name in names)
LIVER, SPLEEN, KIDNEYS, AORTA, CAVA, BONE, LESION, LUNGS = range(1, len(CLASSES) + 1)
AIR, LUNG, BOWEL_GAS = -1000.0, -800.0, -850.0


class Volume(NamedTuple):
    """A scan.

    Args:
        image: ``(D, H, W)`` int16 Hounsfield units.
        label: ``(D, H, W)`` uint8, place in :data:`CLASSES` + 1, 0 background: every structure is labelled.
        spacing: (D, H, W) in mm.
        origin: (D, H, W): where the first voxel lies, in mm.
    """

    image: npt.NDArray[np.int16]
    label: npt.NDArray[np.uint8]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]


class Tissues(NamedTuple):
    """Hounsfield units of a patient."""

    fat: float
    muscle: float
    liver: float
    spleen: float
    kidneys: float
    blood: float
    bone: float


class Build(NamedTuple):
    """Size of a patient, in mm: of the body (half width, half depth), of what is under the skin, and of all organs."""

    width: float
    depth: float
    fat: float
    scale: float


def draw_torso(rng: np.random.Generator, size: int, scanner: Scanner) -> Volume:
    """Draw a torso of ``size`` × ``size`` pixels in plane and three quarters as many slices."""
    scale = rng.uniform(0.9, 1.08)
    build = Build(
        150 * scale * rng.uniform(0.96, 1.06), 108 * scale * rng.uniform(0.92, 1.1), rng.uniform(9, 20), scale
    )
    contrast = scanner.contrast * rng.uniform(0.8, 1)
    tissues = Tissues(
        fat=rng.uniform(-110, -90),
        muscle=rng.uniform(48, 62),
        liver=rng.uniform(56, 66) + 30 * contrast,
        spleen=rng.uniform(46, 56) + 70 * contrast,
        kidneys=rng.uniform(30, 38) + 165 * contrast,
        blood=rng.uniform(38, 46) + 95 * contrast,
        bone=rng.uniform(520, 680),
    )
    scene, spacing, origin = _grid(rng, size, build, scanner)
    outside = _body(scene, build, tissues)
    _bowel(rng, scene, build, outside)
    _chest(rng, scene, build, tissues, outside)
    _abdomen(rng, scene, build, tissues)
    _spine_and_vessels(rng, scene, build, tissues)
    _lesions(rng, scene, build, tissues)
    image = scene.image + np.float32(7) * smooth(rng, scene.image.shape, (9, 12, 12)) * (scene.image > -300)
    # hardened beams: the middle of the body becomes darker
    image += np.float32(12 * (scanner.bias - 1)) * np.clip(-outside / np.float32(build.depth), -0.2, 1)
    image = blurred(image, scanner.blur + 0.1, (1, 2))
    # noise of a reconstructed scan is not white: neighbours in a slice are correlated
    noise = blurred(rng.standard_normal(image.shape, np.float32), 0.35, (1, 2))
    image += np.float32(rng.uniform(9, 15) * scanner.noise) * noise
    return Volume(np.rint(np.clip(image, -1024, 1500)).astype(np.int16), scene.label, spacing, origin)


def _grid(
    rng: np.random.Generator, size: int, build: Build, scanner: Scanner
) -> tuple[Scene, tuple[float, float, float], tuple[float, float, float]]:
    """An empty scan whose field of view holds the body, with the bent and turned coordinates of the patient."""
    shape = (size * 3 // 4, size, size)
    in_plane = rounded(
        max(4.5, min(6.0, (2.14 * build.width / 64 + rng.uniform(0, 0.4)) * scanner.spacing)) * 64 / size
    )
    between = rounded(min(7.5, rng.uniform(5.0, 7.25) * scanner.spacing) * 64 / size)
    spacing = (between, in_plane, in_plane)
    middle = (rng.uniform(-8, 8) - 5, rng.uniform(-5, 5), rng.uniform(-5, 5))
    axes = tuple(
        ((np.arange(n) - (n - 1) / 2) * step + shift).astype(np.float32)
        for n, step, shift in zip(shape, spacing, middle, strict=True)
    )
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    turn, tilt = np.radians(rng.uniform(-6, 6)), np.radians(rng.uniform(-3, 3))
    bend = [np.float32(a) * smooth(rng, shape, (4, 5, 5)) for a in (5, 4, 4)]
    at = (
        z + np.float32(np.sin(tilt)) * x + bend[0],
        np.float32(np.cos(turn)) * y - np.float32(np.sin(turn)) * x + bend[1],
        np.float32(np.sin(turn)) * y + np.float32(np.cos(turn)) * x + bend[2],
    )
    scene = Scene(
        axes,
        at,
        np.full(shape, AIR, np.float32),
        np.zeros(shape, np.uint8),
        edge=in_plane,
        reach=0.12 * build.width + 12,
    )
    depth, height, width = (round(-2 * (n - 1) * step) / 4 for n, step in zip(shape, spacing, strict=True))
    return scene, spacing, (depth, height, width)


def _body(scene: Scene, build: Build, tissues: Tissues) -> Floats:
    """Paint skin, fat and the muscles of the wall; returns how far each voxel lies outside of the body, in mm."""
    z, y, x = scene.at
    # flatter than an ellipse, and a little wider in the middle
    wide = np.float32(build.width) * (1 + np.float32(0.03) * np.cos(z * np.float32(1 / 60)))
    across, along = np.square(x / wide), np.square(y * np.float32(1 / build.depth))
    rho = np.sqrt(across + along + np.float32(0.35) * across * along)
    outside: Floats = (rho - 1) * np.float32(build.depth)
    skin, wall = build.fat, build.fat + 14
    scene.paint(outside, 20)
    scene.paint(outside + np.float32(3), tissues.fat)
    scene.paint(outside + np.float32(skin), tissues.muscle)
    scene.paint(outside + np.float32(wall), tissues.fat)
    for side in (-1, 1):
        back = (0, -0.72 * build.depth, side * 36 * build.scale)
        scene.blob(back, (400, 21 * build.scale, 29 * build.scale), tissues.muscle)
        psoas = (-110 * build.scale, -44 * build.scale, side * 38 * build.scale)
        scene.blob(psoas, (85 * build.scale, 17 * build.scale, 16 * build.scale), tissues.muscle)
    return outside


def _bowel(rng: np.random.Generator, scene: Scene, build: Build, outside: Floats) -> None:
    """Loops with contents and gas in the fat of the lower abdomen."""
    shape = scene.image.shape
    loops = smooth(rng, shape, (10, 11, 11)) * np.float32(12)
    front = np.float32(18 * build.scale) - scene.at[1]
    room = np.maximum(
        outside + np.float32(build.fat + 18), np.maximum(front, scene.at[0] + np.float32(40 * build.scale))
    )
    scene.paint(np.maximum(room, np.float32(-1) - loops), rng.uniform(25, 45))
    scene.paint(np.maximum(room, np.float32(11) - loops), BOWEL_GAS)


def _chest(rng: np.random.Generator, scene: Scene, build: Build, tissues: Tissues, outside: Floats) -> None:
    """Lungs, heart, sternum and ribs."""
    z, y, x = scene.at
    s, shape = build.scale, scene.image.shape
    inner = outside + np.float32(build.fat + 15)
    for side in (-1, 1):
        centre = (112 * s, -4 * s, side * 0.47 * build.width)
        lung = scene.ellipsoid(centre, (122 * s, 0.82 * build.depth, 0.41 * build.width))
        vessels = LUNG + 90 * np.square(smooth(rng, shape, (16, 20, 20)))
        scene.paint(np.maximum(lung, inner), vessels.astype(np.float32), LUNGS)
    blood = tissues.blood
    scene.blob((62 * s, 26 * s, -16 * s), (54 * s, 44 * s, 54 * s), tissues.muscle + 20)
    scene.blob((66 * s, 28 * s, -34 * s), (36 * s, 24 * s, 28 * s), blood)
    scene.blob((72 * s, 26 * s, 18 * s), (34 * s, 24 * s, 20 * s), 0.9 * blood)
    scene.blob((150 * s, build.depth - build.fat - 9, 0), (115 * s, 7, 17 * s), 0.5 * tissues.bone)
    # A rib is where a slanted layer meets the shell of the chest: a slice then cuts several ribs, as in patients.
    pitch = np.float32(27 * s)
    height = z + np.float32(0.55) * y + np.float32(rng.uniform(0, 27))
    layer = np.abs(np.mod(height, pitch) - pitch / 2) - np.float32(6.5 * s)
    margin = np.float32(-85 * s) + np.float32(0.75) * (y + np.float32(40 * s)) - z
    shell = np.abs(outside + np.float32(build.fat + 8)) - np.float32(4.5)
    beside = np.float32(24 * s) - np.abs(x)
    scene.paint(np.maximum(np.maximum(shell, layer), np.maximum(margin, beside)), 0.75 * tissues.bone)


def _abdomen(rng: np.random.Generator, scene: Scene, build: Build, tissues: Tissues) -> None:
    """Stomach, spleen, liver and kidneys; what lies above the diaphragm was painted before and is covered here."""
    s, w = build.scale, build.width / (150 * build.scale)

    def near(*centre: float, spread: float = 5) -> list[float]:
        return [(c + rng.uniform(-spread, spread)) * s for c in centre]

    def grown(*radii: float, spread: float = 0.08) -> list[float]:
        factor = rng.uniform(1 - spread, 1 + spread)
        return [r * factor * rng.uniform(0.95, 1.05) * s for r in radii]

    stomach = near(-22, 34, -62 * w)
    scene.blob(stomach, grown(46, 34, 38), tissues.muscle)
    inside = grown(40, 28, 32)
    scene.blob(stomach, inside, 15)
    # gas collects at the front of a patient who lies on the back
    scene.blob((stomach[0], stomach[1] + 0.6 * inside[1], stomach[2]), (26 * s, 11 * s, 20 * s), BOWEL_GAS)

    spleen, radii = near(-24, -32, -95 * w), grown(56, 45, 32)
    box = scene.box(spleen, radii)
    stomach_side = scene.ellipsoid((spleen[0], spleen[1] + 24 * s, spleen[2] + 44 * s), (74 * s, 38 * s, 30 * s), box)
    scene.paint(np.maximum(scene.ellipsoid(spleen, radii, box), -stomach_side), tissues.spleen, SPLEEN, box)

    right, left = near(-38, 4, 66 * w), near(-14, 42, 0)
    box = scene.box((right[0], 14 * s, 30 * s), (90 * s, 95 * s, 125 * s))
    lobes = np.minimum(scene.ellipsoid(right, grown(76, 78, 64), box), scene.ellipsoid(left, grown(40, 30, 62), box))
    hilum = scene.ellipsoid((-62 * s, -14 * s, 10 * s), (40 * s, 36 * s, 34 * s), box)
    scene.paint(np.maximum(lobes, -hilum), tissues.liver, LIVER, box)

    for side in (-1, 1):
        kidney = near(-78 if side > 0 else -66, -46, side * 62 * w)
        scene.blob(kidney, grown(63, 37, 36, spread=0.04), tissues.fat)
        cortex = grown(56, 31, 30, spread=0.06)
        scene.blob(kidney, cortex, tissues.kidneys, KIDNEYS)
        pelvis = (kidney[0], kidney[1] + 4 * s, kidney[2] - side * 17 * s)
        scene.blob(pelvis, (20 * s, 9 * s, 13 * s), tissues.fat + 40)


def _spine_and_vessels(rng: np.random.Generator, scene: Scene, build: Build, tissues: Tissues) -> None:
    """Vertebrae with discs between them, aorta in front on the left, vena cava in front on the right."""
    z, y, x = scene.at
    s = build.scale
    back = -0.52 * build.depth
    box = scene.box((0, back - 10 * s, 0), (400, 60 * s, 48 * s))
    level, front, aside = z[box], y[box] - np.float32(back), x[box]
    body = (np.hypot(front * np.float32(1.22), aside) - np.float32(22 * s)).astype(np.float32)
    scene.paint(body, 85, 0, box)  # discs
    pitch = np.float32(rng.uniform(31, 34) * s)
    gap = np.abs(np.mod(level + np.float32(rng.uniform(0, 30)), pitch) - pitch / 2) - np.float32(0.39) * pitch
    bone = np.maximum(body, gap)
    spongy = np.where(bone > -4.5, np.float32(tissues.bone), np.float32(0.5 * tissues.bone))
    arch = np.abs(np.hypot(front + np.float32(27 * s), aside) - np.float32(14 * s)) - np.float32(4.5 * s)
    process = np.maximum(np.abs(aside) - np.float32(4.5 * s), np.abs(front + np.float32(48 * s)) - np.float32(12 * s))
    wings = np.maximum(
        np.abs(front + np.float32(20 * s)) - np.float32(5 * s), np.abs(np.abs(aside) - np.float32(24 * s)) - 14 * s
    )
    scene.paint(np.maximum(np.minimum(process, wings), gap + np.float32(4)), 0.7 * tissues.bone, BONE, box)
    scene.paint(arch, 0.8 * tissues.bone, BONE, box)
    scene.paint(bone, spongy, BONE, box)
    scene.paint((np.hypot(front + np.float32(27 * s), aside) - np.float32(9 * s)), 30, 0, box)  # spinal canal

    aorta = np.hypot(y - np.float32(back + 34 * s), x + np.float32(15 * s) + np.float32(0.04) * z)
    scene.paint(aorta - np.float32(rng.uniform(12.5, 15) * s), tissues.blood, AORTA)
    # the vena cava runs forward into the heart, and on to the neck
    forward = np.float32(back + 38 * s) + np.float32(0.2) * np.clip(z, -20, 140)
    cava = np.hypot(y - forward, x - np.float32(24 * s))
    scene.paint(cava - np.float32(rng.uniform(12.5, 15) * s), 0.8 * tissues.blood + 6, CAVA)


def _lesions(rng: np.random.Generator, scene: Scene, build: Build, tissues: Tissues) -> None:
    """Two or three round lesions within the liver, each at least four voxels across along every axis."""
    darker, count = rng.uniform(38, 50), int(rng.integers(2, 4))
    for side in rng.permutation(3)[:count]:
        radius = rng.uniform(19, 27)
        turn = rng.uniform(-0.6, 0.6) + 2 * np.pi / 3 * float(side)
        centre = (
            -34 * build.scale + rng.uniform(-14, 14),
            12 + 34 * np.cos(turn),
            72 * build.scale + 30 * np.sin(turn),
        )
        box = scene.box(centre, (radius,) * 3)
        shape = np.maximum(
            scene.ellipsoid(centre, (radius, radius, radius), box),
            np.where(scene.label[box] == LIVER, np.float32(-1e3), np.float32(1e3)),
        )
        scene.paint(shape, tissues.liver - darker, LESION, box)

"""The grid that the slices of a DICOM series lie on; series that lie on none are refused with figures."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from patchmill.errors import SourceError
from patchmill.sources.volumes.dicomseries import Plane, SliceHeader

__all__ = ["AGAIN", "Stack", "stack_of"]

Slices = list[tuple[SliceHeader, Plane]]
AGAIN = "export the series again"

COSINE = 1e-3  # most by which a direction's cosines may differ; a voxel at the edge of 512 then moves by half a voxel
SAME_SPACING = 1e-3  # most by which spacing within the slices may differ, as a fraction
SAME_PLACE = 0.01  # of the spacing within a slice: nearer slices are two images of one place
SIDEWAYS = 0.01  # of a step: more in-plane shift from slice to slice is a tilted gantry, or a jump of the table
UNEVEN = 0.05  # of the median step; beds of PET are joined with steps that differ by some 2 %
ASTRAY = 0.25  # of the median step: further from the regular grid a voxel would be nearer to its neighbour's place


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The slices of a volume in the order of their places."""

    slices: tuple[tuple[SliceHeader, Plane], ...]
    shape: tuple[int, int, int]  # columns, rows, slices
    affine: Float64[np.ndarray, "4 4"]  # from (column, row, slice) of a voxel's centre to millimetres, RAS+


def stack_of(series: tuple[SliceHeader, ...], source: str) -> Stack:
    """The slices of a series in order, and their grid. Localizers are left out where there are other images.

    Slices are ordered by their positions along the normal of ImageOrientationPatient. The grid goes through the first
    and the last of them. Raises SourceError, with the figures, for what is no regular grid. source: the id that errors
    name.
    """
    slices: Slices = [(each, plane) for each in series if "LOCALIZER" not in each.image_type for plane in each.planes]
    if not slices:
        raise SourceError(source, "its images are localizers", "name a series of slices")
    check_alike(slices, source)
    first = slices[0][1]
    along, down = (np.array(each) / np.linalg.norm(each) for each in (first.orientation[:3], first.orientation[3:]))
    normal = np.cross(along, down)
    places = np.array([plane.position for _, plane in slices])
    order = np.argsort(places @ normal, kind="stable")
    if len(slices) == 1 and not first.thickness > 0:
        raise SourceError(source, "its one slice tells no thickness", AGAIN)
    step = normal * first.thickness if len(slices) == 1 else step_of(places[order], normal, min(first.spacing), source)
    header = slices[0][0]
    affine = np.eye(4)
    affine[:3] = np.stack([along * first.spacing[1], down * first.spacing[0], step, places[order[0]]], axis=1)
    affine[:2] *= -1  # from LPS to RAS
    affine += 0.0  # no negative zeros
    return Stack(tuple(slices[n] for n in order), (header.columns, header.rows, len(slices)), affine)


def check_alike(slices: Slices, source: str) -> None:
    """Raise SourceError unless all slices are of one modality and frame of reference, tell a place, and have one size,
    spacing and orientation that can be.
    """
    planes = [plane for _, plane in slices]
    modality = slices[0][0].modality
    others = sum(header.modality != modality or not header.alike for header, _ in slices)
    if others:
        wrong = f"{others} of {len(slices)} slices tell another modality than {modality}"
        raise SourceError(source, wrong, "split the series by modality, or correct its tags")
    references = {header.reference for header, _ in slices}
    if len(references) > 1:
        wrong = f"its slices lie in {len(references)} frames of reference, so nothing says how they lie to each other"
        raise SourceError(source, wrong, "split the series by FrameOfReferenceUID")
    lost = sum(
        [len(plane.position), len(plane.orientation), len(plane.spacing)] != [3, 6, 2]
        or not all(map(math.isfinite, plane.position + plane.orientation))
        for plane in planes
    )
    if lost:
        wrong = f"{lost} of {len(slices)} slices do not tell position, orientation and pixel spacing"
        raise SourceError(source, wrong, AGAIN)
    sizes = sorted({(header.columns, header.rows) for header, _ in slices})
    if len(sizes) > 1:
        wrong = (
            f"its slices have {len(sizes)} sizes: {sizes[0][0]} x {sizes[0][1]} to {sizes[-1][0]} x {sizes[-1][1]} px"
        )
        raise SourceError(source, wrong, "split the series by size")
    spacings = np.array([plane.spacing for plane in planes])
    low, high = spacings.min(axis=0), spacings.max(axis=0)
    if not (low > 0).all():
        raise SourceError(source, f"its pixel spacing is {low[1]:g} x {low[0]:g} mm", AGAIN)
    if ((high - low) > SAME_SPACING * low).any():
        wrong = f"its pixel spacing goes from {low[1]:g} x {low[0]:g} to {high[1]:g} x {high[0]:g} mm"
        raise SourceError(source, wrong, "split the series by spacing")
    cosines = np.array([plane.orientation for plane in planes])
    along, down = cosines[0, :3], cosines[0, 3:]
    products = np.array([along @ along - 1, down @ down - 1, along @ down])
    if not (np.abs(products) <= 2 * COSINE).all():
        raise SourceError(source, "its rows and columns are no perpendicular unit vectors", AGAIN)
    turned = int((np.abs(cosines - cosines[0]) > COSINE).any(axis=1).sum())
    if turned:
        wrong = f"{turned} of {len(slices)} slices have another orientation than the first"
        raise SourceError(source, wrong, "split the series by orientation")


def step_of(
    places: Float64[np.ndarray, "n 3"], normal: Float64[np.ndarray, " 3"], spacing: float, source: str
) -> Float64[np.ndarray, " 3"]:
    """The step from slice to slice in mm, LPS. places: positions in order. spacing: mm within a slice.

    Raises SourceError where slices share a place, are missing, shift sideways, or go in uneven steps.
    """
    count = len(places)
    normal = normal / np.linalg.norm(normal)
    ways = np.diff(places, axis=0)
    steps = ways @ normal
    check_single(steps, spacing, source)
    usual = float(np.sort(steps)[(count - 2) // 2])  # the lower median: of a short and a long step the short one
    shifts = ways - steps[:, None] * normal
    sideways = np.linalg.norm(shifts, axis=1)
    if (worst := float(sideways.max())) > SIDEWAYS * usual:
        tilt = math.degrees(math.atan2(float(np.linalg.norm(shifts.sum(axis=0))), float(steps.sum())))
        if tilt > math.degrees(SIDEWAYS):
            wrong = f"its gantry was tilted by {tilt:.1f} degrees: slices shift sideways by up to {worst:.3g} mm a step"
            raise SourceError(source, wrong, "resample it to an upright grid")
        wrong = f"slice {int(sideways.argmax()) + 2} of {count} is shifted sideways by {worst:.3g} mm"
        raise SourceError(source, wrong, "resample it to one grid")
    times = np.rint(steps / usual)
    gaps = np.flatnonzero((times > 1) & (np.abs(steps - times * usual) <= ASTRAY * usual))
    if len(gaps):
        lost, at = int((times[gaps] - 1).sum()), int(gaps[0])
        missing = "1 slice is missing" if lost == 1 else f"{lost} slices are missing"
        where = f"after slice {at + 1} of {count}" if len(gaps) == 1 else f"in {len(gaps)} places, first after {at + 1}"
        wrong = f"{missing} {where}: a step of {steps[at]:.4g} mm among steps of {usual:.4g} mm"
        raise SourceError(source, wrong, "copy the whole series")
    if (np.abs(steps - usual) > UNEVEN * usual).any():
        wrong = f"its steps are uneven: {steps.min():.4g} to {steps.max():.4g} mm, the median is {usual:.4g} mm"
        raise SourceError(source, wrong, "resample it to even steps")
    step: Float64[np.ndarray, " 3"] = (places[-1] - places[0]) / (count - 1)
    astray = np.linalg.norm(places - places[0] - np.arange(count)[:, None] * step, axis=1)
    if (most := float(astray.max())) > ASTRAY * usual:
        wrong = f"slice {int(astray.argmax()) + 1} of {count} lies {most:.3g} mm beside the regular grid"
        raise SourceError(source, wrong, "resample it to even steps")
    return step


def check_single(steps: Float64[np.ndarray, " n"], spacing: float, source: str) -> None:
    """Raise SourceError where several images lie in one place. steps: mm along the normal, none negative."""
    counts = np.bincount(np.cumsum(np.append(0, steps > SAME_PLACE * spacing)))
    if counts.max() > 1:
        shared = int((counts > 1).sum())
        each = f"{counts.max()} images" if counts[counts > 1].min() == counts.max() else f"up to {counts.max()} images"
        wrong = f"it has {each} in each of {shared} places, of {len(counts)} places in all"
        raise SourceError(source, wrong, "split the series by phase, echo or b-value")

"""What detectors have in common: suppression of overlapping boxes, and COCO's average precision."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

_OVERLAP = 0.6  # IoU of two boxes that are one object


def suppressed(found: np.ndarray, overlap: float = _OVERLAP) -> np.ndarray:
    """Returns the detections that no better one of their class overlaps, best first.

    Args:
        found: [boxes, 6]: left, upper, right and lower side, class, score.
        overlap: the intersection over union from which on two boxes are one object.
    """
    rest, kept = found[np.argsort(-found[:, 5], kind="stable")], []
    while len(rest):
        best, rest = rest[0], rest[1:]
        kept.append(best)
        rest = rest[(rest[:, 4] != best[4]) | (iou(best, rest) < overlap)]
    return np.array(kept, "float32").reshape(-1, 6)


def iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of a box and each of others, by their sides: [boxes]."""
    sides = np.minimum(box[2:4], others[:, 2:4]) - np.maximum(box[:2], others[:, :2])
    both = np.prod(np.maximum(sides, 0), axis=1)
    areas = np.prod(box[2:4] - box[:2]) + np.prod(others[:, 2:4] - others[:, :2], axis=1)
    return both / np.maximum(areas - both, 1e-7)


def average_precision(measured: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Returns the mean average precision by pycocotools, from 0 to 1.

    Args:
        measured: for each image its boxes [boxes, 5] (left, upper, right, lower side, class) and the detected ones
            [boxes, 6] (the same and a score).

    Returns:
        `map`, the mean over the IoU thresholds 0.5, 0.55, ... 0.95, and `map_50`, at 0.5.

    Raises:
        ImportError: pycocotools is not installed.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, results = COCO(), []
    annotations: list[dict[str, Any]] = []
    for image, (boxes, found) in enumerate(measured):
        annotations += [_annotation(box, image, len(annotations) + n) for n, box in enumerate(boxes, 1)]
        results += [{**_annotation(box, image, 0), "score": float(box[5])} for box in found]
    classes = sorted({annotation["category_id"] for annotation in annotations})
    truth.dataset = {
        "images": [{"id": image} for image in range(len(measured))],
        "annotations": annotations,
        "categories": [{"id": one} for one in classes],
    }
    if not results or not annotations:
        return {"map": 0.0, "map_50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its tables
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"map": float(evaluation.stats[0]), "map_50": float(evaluation.stats[1])}


def _annotation(box: np.ndarray, image: int, number: int) -> dict[str, Any]:
    left, upper, right, lower = (float(side) for side in box[:4])
    sides = [left, upper, right - left, lower - upper]
    area = sides[2] * sides[3]
    return {
        "id": number,
        "image_id": image,
        "category_id": int(box[4]),
        "bbox": sides,
        "area": area,
        "iscrowd": 0,
    }

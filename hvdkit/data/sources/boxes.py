"""Images with boxes around objects: scenes of digits, and folders in COCO's format.

The label of an image is float32 [boxes, 5]: left, upper, right and lower side of each box in pixels, and the number of
its class; where an image has fewer boxes than others, rows of -1.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data.sources import images
from hvdkit.data.sources.arrays import ArraySource, load_digits
from hvdkit.data.sources.schema import AS_COMPILED
from hvdkit.errors import UsageError

KIND = "boxes"
_SCENE = 64  # pixels
_SCENES = {"train": 4000, "test": 500}
_DIGITS = 4  # in a scene, at most
_SCALES = (2, 3)  # times the digit's 8 pixels
_TRIES = 20  # to place a digit beside the others
_INK = 64  # of 255, from which a pixel belongs to a digit


def load_digit_scenes() -> ArraySource:
    """Composes scenes of 64×64 pixels, each with one to four of scikit-learn's real digits, enlarged 2 or 3 times.

    Boxes enclose the digits' ink exactly, and do not overlap. 4,000 scenes have digits of the training split of
    `digits`, and 500 those of its test split. They are the same in each process.
    """
    digits = load_digits()
    splits = {}
    for number, (split, scenes) in enumerate(_SCENES.items()):
        whole = digits.read(split, 0, digits.size(split)).batch(digits.size(split)).get_single_element()
        pixels, classes = (part.numpy() for part in whole)
        made = [_scene(np.random.default_rng([number, scene]), pixels[..., 0], classes) for scene in range(scenes)]
        splits[split] = np.stack([scene for scene, _ in made]), padded([boxes for _, boxes in made])
    return _source("digit_scenes", digits.label_names, splits)


def _scene(generator: np.random.Generator, pixels: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a scene, uint8 [64, 64, 1], and its boxes [boxes, 5]."""
    scene, boxes = generator.integers(0, 32, [_SCENE, _SCENE]).astype(np.uint8), []
    taken = np.zeros_like(scene, bool)
    for _ in range(generator.integers(1, _DIGITS + 1)):
        chosen, scale = generator.integers(len(pixels)), generator.choice(_SCALES)
        digit = np.kron(pixels[chosen], np.ones([scale, scale], np.uint8))
        ink = np.argwhere(digit >= _INK)
        (top, left), (bottom, right) = ink.min(axis=0), ink.max(axis=0) + 1
        digit = digit[top:bottom, left:right]
        for _ in range(_TRIES):
            y, x = generator.integers(0, _SCENE - digit.shape[0]), generator.integers(0, _SCENE - digit.shape[1])
            place = slice(y, y + digit.shape[0]), slice(x, x + digit.shape[1])
            if not taken[place].any():
                taken[place] = True
                scene[place] = np.maximum(scene[place], digit)
                boxes.append([x, y, x + digit.shape[1], y + digit.shape[0], classes[chosen]])
                break
    return scene[..., None], np.array(boxes, np.float32)


def padded(boxes: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the boxes of all images in one array, float32 [images, most boxes, 5]."""
    whole = np.full([len(boxes), max([1, *map(len, boxes)]), 5], -1, np.float32)
    for rows, found in zip(whole, boxes, strict=True):
        rows[: len(found)] = found.reshape(-1, 5)
    return whole


def _source(name: str, classes: list[str], splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> ArraySource:
    source = ArraySource(name, KIND, classes, splits, task=AS_COMPILED)
    source.shape = splits["train"][0].shape[1:]
    return source


class CocoSource(ArraySource):
    """Images and boxes of a folder in COCO's format; see `Source` for the attributes.

    Its `annotations` folder has a file of each split, `instances_train2017.json` or with another name that begins with
    `train` or `val` behind `instances_`, and a folder of that name the images. Crowds are left out.

    Args:
        path: the folder.
        image_size: height and width to resize images to; boxes are scaled with them.

    Raises:
        UsageError: a file is missing or has another form, or no size is given.
    """

    def __init__(self, path: Path, image_size: int | None) -> None:
        if not image_size:
            raise UsageError(f"The images of {path} differ in size: set the one to resize them to: --image-size=256.")
        found = {split: _annotations(path, prefix) for split, prefix in (("train", "train"), ("test", "val"))}
        numbers = sorted(category["id"] for category in found["train"][1]["categories"])
        names = {category["id"]: str(category["name"]) for category in found["train"][1]["categories"]}
        splits = {
            split: _listed(path / folder, content, {number: place for place, number in enumerate(numbers)}, image_size)
            for split, (folder, content) in found.items()
        }
        super().__init__(path.name, KIND, [names[number] for number in numbers], splits, task=AS_COMPILED)
        self._size = image_size
        self.shape = (image_size, image_size, 3)

    def read(self, split: str, start: int, stop: int) -> tf.data.Dataset:
        """Examples `start` to `stop` of a split, images as the bytes of their files."""
        paths = super().read(split, start, stop)
        return paths.map(lambda path, boxes: (tf.io.read_file(path), boxes), num_parallel_calls=tf.data.AUTOTUNE)

    def decode(self, encoded: Any) -> tf.Tensor:
        """Decodes an image and resizes it, whatever its proportions: uint8, with three channels."""
        image = images.resize(images.decode(encoded, 2**16 - 1), self._size)
        return tf.ensure_shape(image, self.shape)

    def locate(self, split: str, index: int) -> str:
        """The path of an example's file."""
        return str(self._splits[split][0][index])


def is_coco_folder(path: Path) -> bool:
    """Returns whether a folder has COCO's annotations."""
    return any((path / "annotations").glob("instances_*.json"))


def _annotations(path: Path, prefix: str) -> tuple[str, dict[str, Any]]:
    """Returns the name of the folder with the images of a split, and the content of its annotations."""
    files = sorted((path / "annotations").glob(f"instances_{prefix}*.json"))
    if not files:
        raise UsageError(
            f"{path} has no annotations/instances_{prefix}*.json. COCO's format has one for each split: instances_"
            f"train2017.json and instances_val2017.json, with the images in train2017 and val2017."
        )
    folder = files[0].stem.removeprefix("instances_")
    if not (path / folder).is_dir():
        raise UsageError(f"{files[0]} describes images that should be in {path / folder}, which is not there.")
    try:
        content = json.loads(files[0].read_text())
        return folder, {name: list(content[name]) for name in ("images", "annotations", "categories")}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{files[0]} is not in COCO's format ({type(error).__name__}: {error}): a JSON object with images, "
            f"annotations and categories."
        ) from None


def _listed(folder: Path, content: dict[str, Any], classes: dict[int, int], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the paths of a split's images and their boxes in the pixels of resized images."""
    by_image: dict[int, list[list[float]]] = {image["id"]: [] for image in content["images"]}
    scale = {image["id"]: (size / image["width"], size / image["height"]) for image in content["images"]}
    for one in content["annotations"]:
        if one.get("iscrowd") or one["image_id"] not in by_image:
            continue
        if one["category_id"] not in classes:
            raise UsageError(f"{folder}: an object is of category {one['category_id']}, which the train split lacks.")
        (x, y, width, height), (across, down) = one["bbox"], scale[one["image_id"]]
        sides = [x * across, y * down, (x + width) * across, (y + height) * down]
        by_image[one["image_id"]].append([*sides, classes[one["category_id"]]])
    paths = np.asarray([str(folder / image["file_name"]) for image in content["images"]], object)
    if not len(paths):
        raise UsageError(f"The annotations of {folder} name no image.")
    boxes = padded([np.array(by_image[image["id"]], np.float32) for image in content["images"]])
    order = np.random.default_rng(0).permutation(len(paths))
    return paths[order], boxes[order]

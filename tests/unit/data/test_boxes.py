"""Images with boxes: scenes of digits, and folders in COCO's format."""

import json

import numpy as np
import pytest
from PIL import Image

from hvdkit.data.sources import boxes, open_source
from hvdkit.errors import UsageError


def everything(source, split):
    size = source.size(split)
    images, labels = (
        source.read(split, 0, size).map(lambda x, y: (source.decode(x), y)).batch(size).get_single_element()
    )
    return images.numpy(), labels.numpy()


def test_the_boxes_of_scenes_enclose_their_digits_exactly():
    source = open_source("digit_scenes")
    assert (source.kind, source.shape, source.size("train"), source.size("test")) == ("boxes", (64, 64, 1), 4000, 500)
    assert source.label_names == list("0123456789")
    images, labels = everything(source, "test")
    assert (images.dtype, labels.shape) == (np.uint8, (500, 4, 5))
    numbers = []
    for image, found in zip(images[..., 0], labels, strict=True):
        found = found[found[:, 4] >= 0].astype(int)
        numbers.append(len(found))
        outside = image.copy()
        for left, upper, right, lower, _ in found:
            inside = outside[upper:lower, left:right]
            assert min(inside[0].max(), inside[-1].max(), inside[:, 0].max(), inside[:, -1].max()) >= 64, "ink"
            inside[:] = 0
        assert outside.max() < 64, "there is ink in no box, or in two"
    assert set(numbers) == {1, 2, 3, 4}
    again, same = everything(open_source("digit_scenes"), "test")
    assert (again == images).all()
    assert (same == labels).all()


def write_coco(folder, splits=("train2017", "val2017"), **changes):
    """Two images, 20×10 and 40×40, of which the second one has a dog, a cat and a crowd."""
    (folder / "annotations").mkdir(parents=True)
    for split in splits:
        (folder / split).mkdir()
        sizes = {7: (20, 10), 9: (40, 40)}
        for number, size in sizes.items():
            Image.new("RGB", size, (number, 0, 0)).save(folder / split / f"{number}.png")
        boxes = [(9, 18, [10, 20, 4, 8], 0), (9, 3, [0, 0, 40, 20], 0), (9, 3, [1, 1, 2, 2], 1)]
        content = {
            "images": [
                {"id": n, "file_name": f"{n}.png", "width": width, "height": height}
                for n, (width, height) in sizes.items()
            ],
            "annotations": [
                {"id": n, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
                for n, (image, category, box, crowd) in enumerate(boxes)
            ],
            "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "cat"}],
            **changes,
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def test_a_folder_in_cocos_format(tmp_path):
    source = open_source(str(write_coco(tmp_path / "pets")), image_size=80)
    assert (source.name, source.label_names, source.shape) == ("pets", ["cat", "dog"], (80, 80, 3))
    images, labels = everything(source, "train")
    by_color = {int(image[0, 0, 0]): found for image, found in zip(images, labels, strict=True)}
    assert (by_color[7] == -1).all()
    assert by_color[9].tolist() == [[20, 40, 28, 56, 1], [0, 0, 80, 40, 0]]
    assert source.locate("test", 0).endswith(".png")


def test_what_is_wrong_with_such_a_folder_is_said(tmp_path):
    with pytest.raises(UsageError, match=r"differ in size: .*--image-size=256"):
        open_source(str(write_coco(tmp_path / "a")))
    cases = {
        "no annotations/instances_val": write_coco(tmp_path / "b", splits=["train2017"]),
        "is not in COCO's format": write_coco(tmp_path / "c", images=5),
        "category 18, which the train split lacks": write_coco(tmp_path / "d", categories=[{"id": 3, "name": "cat"}]),
        "name no image": write_coco(tmp_path / "e", images=[], annotations=[]),
    }
    for message, folder in cases.items():
        with pytest.raises(UsageError, match=message):
            open_source(str(folder), image_size=80)
    folder = write_coco(tmp_path / "f")
    (folder / "val2017").rename(folder / "other")
    with pytest.raises(UsageError, match=r"should be in .*val2017, which is not there"):
        open_source(str(folder), image_size=80)


def test_a_data_set_of_tfds_with_objects(tmp_path):
    import tensorflow_datasets as tfds

    class Pets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            box = {"bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
            objects = tfds.features.Sequence({**box, "is_crowd": np.bool_})
            features = {"image": tfds.features.Image(shape=(None, None, 3)), "objects": objects}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._examples(), "validation": self._examples()}

        def _generate_examples(self):
            raise NotImplementedError

        def _examples(self):
            first = {"bbox": tfds.features.BBox(0.5, 0.25, 1.0, 0.75), "label": "dog", "is_crowd": False}
            crowd = {**first, "is_crowd": True}
            yield 0, {"image": np.full([10, 20, 3], 9, np.uint8), "objects": [crowd, first]}
            yield 1, {"image": np.full([4, 4, 3], 7, np.uint8), "objects": []}

    Pets(data_dir=str(tmp_path)).download_and_prepare()
    source = open_source("pets", str(tmp_path), image_size=40)
    assert (source.kind, source.task, source.label_names) == ("boxes", "compiled", ["cat", "dog"])
    images, labels = everything(source, "test")
    assert (images.shape, labels.shape) == ((2, 40, 40, 3), (2, 100, 5))
    by_color = {int(image[0, 0, 0]): found for image, found in zip(images, labels, strict=True)}
    assert by_color[9][0].tolist() == [10, 20, 30, 40, 1]
    assert (by_color[9][1:] == -1).all()
    assert (by_color[7] == -1).all()


def test_images_with_fewer_boxes_are_filled_up():
    found = boxes.padded([np.zeros([0, 5], np.float32), np.ones([2, 5], np.float32)])
    assert found.tolist() == [[[-1] * 5] * 2, [[1] * 5] * 2]
    assert boxes.padded([np.zeros([0, 5], np.float32)]).shape == (1, 1, 5)

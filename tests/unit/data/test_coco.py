"""COCO's JSON: what is handled, and what is refused with one clear message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitq.core.errors import DataError
from vitq.data.coco import CocoSet, match_categories, open_coco


def written(folder: Path, **changes: Any) -> Path:
    """Two images, the second without objects, as a JSON; changes replace its lists."""
    data = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 9, "file_name": "b.png", "width": 20, "height": 20},
        ],
        "categories": [{"id": 3, "name": "Cat"}, {"id": 5, "name": "dog"}],
        "annotations": [box(4, 5, 10, 10)],
    }
    for name, size in (("a.png", (40, 30)), ("b.png", (20, 20))):
        Image.new("RGB", size).save(folder / name)
    path = folder / "truth.json"
    path.write_text(json.dumps(data | changes))
    return path


def box(*values: float, image: int = 7, category: int = 3, **more: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": image, "category_id": category, "bbox": list(values), **more}


def opened(folder: Path, masks: bool = False, **changes: Any) -> CocoSet:
    return open_coco(written(folder, **changes), folder, masks=masks)


def test_images_without_objects_stay(tmp_path: Path) -> None:
    data = opened(tmp_path)
    assert [len(photo.objects) for photo in data.photos] == [1, 0]
    assert data.image(1).size == (20, 20)
    assert data.notes == ()
    assert [a["bbox"] for a in data.truth()["annotations"]] == [[4, 5, 10, 10]]


def test_crowd_regions_are_kept_as_such(tmp_path: Path) -> None:
    data = opened(tmp_path, annotations=[box(0, 0, 5, 5), box(4, 5, 10, 10, iscrowd=1)])
    assert [a["iscrowd"] for a in data.truth()["annotations"]] == [0, 1]


def test_boxes_over_the_border_are_clipped_and_counted(tmp_path: Path) -> None:
    data = opened(tmp_path, annotations=[box(30, 20, 50, 50), box(35, 0, 5.5, 5), box(-4, 2, 10, 5)])
    assert [a["bbox"] for a in data.photos[0].objects] == [[30, 20, 10, 10], [35, 0, 5.5, 5], [0, 2, 6, 5]]
    assert "2 boxes reach over the border" in data.notes[0]


def test_boxes_without_area_and_of_unlisted_categories_are_left_out_and_counted(tmp_path: Path) -> None:
    data = opened(tmp_path, annotations=[box(1, 1, 0, 5), box(1, 1, 5, 5), box(2, 2, 4, 4, category=99)])
    assert len(data.photos[0].objects) == 1
    assert ["1 objects are of categories" in data.notes[0], "1 boxes without area" in data.notes[1]] == [True, True]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"annotations": []}, "no annotations"),
        ({"annotations": [box(1, 1, 0, 0)]}, "no annotation has"),
        ({"annotations": [box(41, 1, 5, 5)]}, "lies beside 'a.png', which is 40 x 30"),
        ({"annotations": [box(1, 1, 5)]}, "expected \\[x, y, width, height\\]"),
        ({"annotations": [box(1, 1, float("nan"), 5)]}, "expected \\[x, y, width, height\\]"),
        ({"annotations": [box(1, 1, 5, 5, image=8)]}, "about image 8"),
        ({"annotations": {}}, "no list of 'annotations'"),
        ({"categories": []}, "'categories' is empty"),
        ({"images": [{"id": 7, "file_name": "a.png", "width": "40", "height": 30}]}, "'width' is missing"),
        ({"images": [{"id": 7, "file_name": "gone.png", "width": 40, "height": 30}]}, "1 of 1 images are missing"),
        ({"images": [{"id": 7, "file_name": "a.png", "width": 4, "height": 3}] * 2}, "two images have the same id"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says) as error:
        opened(tmp_path, **changes)
    assert "truth.json" in str(error.value)


def test_masks_are_asked_for_by_the_task_that_needs_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no segmentation"):
        opened(tmp_path, masks=True)


def test_files_that_are_no_json_or_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    for name, says in (("x.json", "not JSON"), ("y.json", "cannot be read")):
        with pytest.raises(DataError, match=says):
            open_coco(tmp_path / name, tmp_path)
    with pytest.raises(DataError, match="no folder"):
        open_coco(written(tmp_path), tmp_path / "nowhere")


def test_photos_are_turned_upright_and_gray_and_cmyk_ones_made_rgb(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 40, "height": 30} for n in (1, 2, 3)]
    path = written(tmp_path, images=images, annotations=[box(1, 1, 5, 5, image=1)])
    tag = Image.Exif()
    tag[0x0112] = 6  # the camera was turned by a quarter
    pixels = np.zeros((40, 30, 3), np.uint8)
    pixels[:10] = 255  # at the top as stored; the right when upright
    Image.fromarray(pixels).save(tmp_path / "1.jpg", exif=tag)
    Image.new("L", (40, 30), 100).save(tmp_path / "2.jpg")
    Image.new("CMYK", (40, 30), (0, 0, 0, 155)).save(tmp_path / "3.jpg")
    data = open_coco(path, tmp_path)
    upright = np.asarray(data.image(0))
    assert upright[:, 32:].min() > 200
    assert upright[:, :28].max() < 50
    for position in (1, 2):
        assert data.image(position).mode == "RGB"
        assert abs(int(np.asarray(data.image(position))[0, 0, 0]) - 100) < 5


def test_a_photo_of_another_size_than_annotated_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    Image.new("RGB", (30, 40)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"30 x 40 pixels \(upright\) and the annotations are for 40 x 30"):
        open_coco(path, tmp_path).image(0)


def test_categories_are_matched_by_name_by_rank_or_by_id() -> None:
    categories = {3: "Cat", 5: "dog"}
    assert match_categories(categories, 3, {0: "dog", 1: "bird", 2: "cat"}) == [5, -1, 3]
    assert match_categories(categories, 2) == [3, 5]
    assert match_categories(categories, 6, {0: "LABEL_0"}) == [-1, -1, 3, -1, 5, -1]
    with pytest.raises(DataError, match=r"2 categories with ids up to 5 .*the model tells 4 classes"):
        match_categories(categories, 4)

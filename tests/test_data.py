"""program/data.py: whatever a row holds becomes what a person would see, or a skipped row with its
reason; and the answers, as they were written."""

import base64
import gzip
import http.server
import io
import json
import re
import struct
import threading
import time
import zlib
from decimal import Decimal

import datasets
import numpy as np
import pytest
import torch
from conftest import make_model, make_processor, picture
from PIL import Image
from transformers import AutoProcessor

import papo
import train_small as ts
from program import UserError, data
from program.data import DataConfig, load_rows, open_dataset, read_row

# ---- Pictures ------------------------------------------------------------------------------------

RAMP = np.arange(0, 256, 17, dtype="uint8").repeat(4).reshape(8, 8)  # 16 greys
INK = np.where(np.arange(8) < 3, 255, 0).astype("uint8")  # alpha: 3 columns of ink, 5 transparent
ON_WHITE = np.where(INK > 0, 0, 255)[None, :, None] * np.ones((8, 8, 3))  # black ink, white ground


def png(bits, kind, rows, transparent):
    """An 8 x 8 PNG of that bit depth and colour type whose tRNS chunk names one value."""
    chunk = lambda name, body: (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    )
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, bits, kind, 0, 0, 0)) + chunk(
        b"tRNS", transparent
    )
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def saved(image, kind, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def drawing(mode):
    """Black ink on transparent ground that would be black, too."""
    ink, black = np.tile(INK, (8, 1)), np.zeros((8, 8), "uint8")
    if mode in ("LA", "RGBA", "PA"):
        return Image.merge(
            "RGBA", [Image.fromarray(x) for x in (black, black, black, ink)]
        ).convert(mode)
    image = Image.fromarray(np.where(ink > 0, 0, 1).astype("uint8")).convert("P")
    image.putpalette([0] * 6)  # two blacks, the second of which is transparent
    return image


def transparent(kind):
    if kind in ("LA", "RGBA"):
        return saved(drawing(kind), "PNG")
    if kind == "grey+tRNS":
        return png(8, 0, np.tile(np.where(INK, 0, 1).astype("u1"), (8, 1)), struct.pack(">H", 1))
    if kind == "grey16+tRNS":
        return png(16, 0, np.tile(np.where(INK, 0, 9).astype(">u2"), (8, 1)), struct.pack(">H", 9))
    if kind == "RGB+tRNS":
        row = np.where(INK, 0, 2).astype("u1").repeat(3)
        return png(8, 2, np.tile(row, (8, 1)), struct.pack(">HHH", 2, 2, 2))
    return saved(drawing("P"), kind, transparency=1)


def ramp(kind):
    """The 16 greys in another mode; the last of each name is the file's kind."""
    wide = RAMP.astype("u2") * 257
    if kind == "PGM":
        return b"P5 8 8 65535\n" + wide.astype(">u2").tobytes()
    if kind == "float TIFF":
        return saved(Image.fromarray(RAMP.astype("f4") / 255), "TIFF")
    if kind == "big-endian TIFF":
        return saved(Image.frombytes("I;16B", (8, 8), wide.astype(">u2").tobytes()), "TIFF")
    return saved(Image.fromarray(wide), kind)


@pytest.mark.parametrize(
    "make, kinds, seen",
    [
        (
            transparent,
            ["LA", "RGBA", "PNG", "GIF", "grey+tRNS", "grey16+tRNS", "RGB+tRNS"],
            ON_WHITE,
        ),
        (
            ramp,
            ["PNG", "TIFF", "big-endian TIFF", "PGM", "float TIFF"],
            RAMP[..., None].repeat(3, 2),
        ),
    ],
    ids=["transparent", "deep grey"],
)
def test_a_picture_is_what_a_person_sees(make, kinds, seen, tmp_path):
    for kind in kinds:
        image = data.as_seen(data.open_image(make(kind), tmp_path))
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), seen, err_msg=kind)


def test_a_range_that_is_not_known_is_a_reason_to_skip(tmp_path):
    for array in (
        RAMP.astype("i4"),
        RAMP.astype("f4"),
        RAMP.astype("f4") / 255 - 0.5,
        RAMP.astype("f4") * np.nan,
    ):
        image = data.open_image(saved(Image.fromarray(array), "TIFF"), tmp_path)
        with pytest.raises(ValueError, match="32-bit image of unknown range"):
            data.as_seen(image)


@pytest.fixture(scope="module")
def server():
    """Serves /good; breaks everything else in ways of its own. -> address, list of what was asked"""
    asked, stop = [], threading.Event()
    good = saved(Image.fromarray(RAMP), "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/loop":
                self.send_response(302)
                self.send_header("Location", "/loop")
                return self.end_headers()
            if self.path == "/silent":
                return stop.wait(60)
            self.send_response(404 if self.path == "/gone" else 200)
            if self.path == "/cut":
                self.send_header("Content-Length", str(2 * len(good)))
            if self.path == "/encoded":
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if self.path == "/drip":  # never silent for long
                while not stop.wait(0.05):
                    self.wfile.write(b"x")
            body = b"no number\r\n" if self.path == "/encoded" else good
            self.wfile.write(body[: len(good) // 2] if self.path == "/cut" else body)

        log_message = lambda *_: None

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}", asked
    stop.set()
    web.shutdown()


def test_every_way_to_bring_a_picture(server, tmp_path):
    """Turned as its EXIF data ask for, whichever way it came."""
    turned = Image.new("RGB", (16, 24), "red")
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6
    whole = saved(turned, "JPEG", exif=exif)
    text = base64.b64encode(whole).decode()
    path = tmp_path / "ä b%20.jpg"
    path.write_bytes(whole)
    ways = [
        Image.open(path),
        path.name,
        str(path),
        path.as_uri(),
        whole,
        text,
        text[:70] + "\n" + text[70:],
    ]
    ways += [
        f"data:image/jpeg;base64,{text}",
        {"bytes": whole, "path": None},
        {"bytes": text},
        {"bytes": list(whole)},
    ]
    ways += [{"bytes": None, "path": path.name}, {"bytes": None, "path": path.as_uri()}]
    for way in ways:
        image = data.as_seen(data.open_image(way, tmp_path))
        assert image.size == (24, 16) and image.getpixel((9, 9))[0] > 250, way
    turned.save(tmp_path / "turned.tiff", exif=exif)
    assert data.as_seen(data.open_image("turned.tiff", tmp_path)).size == (24, 16)
    address, _ = server
    image = data.as_seen(data.open_image(f"{address}/a picture/ä?x=1&y=%20", tmp_path))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], RAMP)


# ---- Rows ----------------------------------------------------------------------------------------

SIZES = "--min-pixels 4704 --max-pixels 15680".split()
QUICK = (
    "--group-size 2 --prompts-per-batch 4 --updates-per-batch 2 --max-new-tokens 4".split() + SIZES
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    processor = make_processor("qwen2_5_vl")
    make_model("qwen2_5_vl", processor).save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def processor():
    return make_processor("qwen2_5_vl")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_run_over_bad_pictures_ends_and_counts_them(
    server, folder, tmp_path, monkeypatch, capsys
):
    """Each dead address is asked once, whatever it does, and costs no more than the time limit."""
    monkeypatch.setattr(data, "FETCH_SECONDS", 0.5)
    (address, asked), start = server, time.perf_counter()
    for path in ("silent", "drip"):
        with pytest.raises(ValueError, match="image cannot be fetched"):
            data.fetch(f"{address}/{path}")
    assert time.perf_counter() - start < 5
    asked.clear()
    picture(1).save(tmp_path / "good.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    Image.new("RGB", (1, 300)).save(tmp_path / "thread.png")
    Image.fromarray(RAMP.astype("i4")).save(tmp_path / "deep.tiff")
    dead = [f"{address}/{path}" for path in ("gone", "loop", "silent", "drip", "encoded")]
    dead += [
        "http://127.0.0.1:9/x.png",
        "http://nobody.invalid/x.png",
        "s3://bucket/x.png",
        "file:///nowhere/x.png",
    ]
    broken = ["damaged.png", "missing.png", f"{address}/cut", "data:image/png;base64,????"]
    images = [[image] for image in dead + broken + ["deep.tiff", "thread.png"]] + [
        [],
        ["good.png"] * 2,
    ]
    rows = [dict(images=image, problem="What is <image> here?", answer="3") for image in images]
    rows += [dict(images=["good.png"], problem="What?", answer="3")] * 2
    flags = [
        "--dataset",
        write_lines(tmp_path / "rows.jsonl", rows),
        "--out",
        str(tmp_path / "run"),
        *QUICK,
    ]
    ts.main(["--model", folder, "--steps", "1", "--eval-size", "1", *flags])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped ")]
    assert sorted(said) == sorted(
        [
            "skipped 9 rows: image cannot be fetched",
            "skipped 4 rows: unreadable image",
            "skipped 1 rows: 32-bit image of unknown range",
            "skipped 1 rows: image more than 200 times longer than wide",
            "skipped 1 rows: no image",
            "skipped 1 rows: the question marks 1 images and brings 2",
        ]
    )
    assert sorted(set(asked) - {"/loop"}) == sorted(path for path in asked if path != "/loop")


def test_a_question_about_several_images(folder, tmp_path, monkeypatch):
    """Each picture stands at its mark; in a run all are masked, afresh, and shown."""
    picture(1, 56, 84).save(tmp_path / "a.png")
    picture(2, 112, 84).save(tmp_path / "b.png")
    questions = [
        (["a.png"], "What?"),
        (["b.png", "a.png"], "Is <image> more than <image>?"),
        (["a.png", "b.png"], "Both?"),
    ]
    rows = [dict(images=i, problem=p, answer="3") for i, p in questions * 4]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    processor = AutoProcessor.from_pretrained(folder)
    config = DataConfig(dataset=file, min_pixels=4704, max_pixels=15680)
    processor.image_processor.size = dict(shortest_edge=4704, longest_edge=15680)
    one, two, first = (read_row(open_dataset(config), i, config, processor) for i in range(3))
    assert [image.size for image in two["images"]] == [(112, 84), (56, 84)]
    assert two["prompt"]["image_grid_thw"].tolist() == [[1, 6, 8], [1, 6, 4]]
    pieces = processor.tokenizer.decode(two["prompt"]["input_ids"][0]).split("<|vision_start|>")
    assert [piece.count("<|image_pad|>") for piece in pieces] == [
        0,
        12,
        6,
    ] and "more than" in pieces[1]
    assert (
        "Both?"
        in processor.tokenizer.decode(first["prompt"]["input_ids"][0]).split("<|vision_end|>")[2]
    )

    masks, seeds, mask_patches = [], [], papo.mask_patches
    note = lambda image, ratio, size, generator: (
        masks.append(mask_patches(image, ratio, size, generator)),
        seeds.append(id(generator)),
        masks[-1],
    )[2]
    monkeypatch.setattr(papo, "mask_patches", note)
    flags = ["--dataset", file, "--out", str(tmp_path / "run"), *QUICK]
    ts.main(["--model", folder, "--steps", "1", "--eval-size", "3", *flags])
    line = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ][1]
    assert line["kl_prcp"] > 0 and line["grad_norm"] > 0 and line["skipped"] == 0
    page = (tmp_path / "run" / "samples.html").read_text()
    assert page.count('alt="image"') == page.count('alt="masked image"') == 5
    model, _ = ts.load_model(ts.RunConfig(model=folder))
    masks.clear(), seeds.clear()
    ts.evaluate(model, processor, papo.PAPOConfig(max_new_tokens=2), [one, two], masked=True)
    assert [mask.size for mask in masks] == [(56, 84), (112, 84), (56, 84)] and len(set(seeds)) == 1
    assert all((np.asarray(mask).reshape(-1, 3).sum(1) == 0).any() for mask in masks)
    assert not np.array_equal(np.asarray(masks[0]), np.asarray(masks[2]))


def open_rows(processor, file, **settings):
    config = DataConfig(dataset=str(file), min_pixels=4704, max_pixels=15680, **settings)
    return load_rows(config, processor)


@pytest.fixture
def files(tmp_path):
    """A jsonl of 40 rows, each with an image file of its own; the answer is the row's number. Every
    third image is damaged."""
    for i in range(40):
        path = tmp_path / f"{i}.png"
        picture(i).save(path)
        if i % 3 == 0:
            path.write_bytes(path.read_bytes()[:60])
    rows = [{"images": f"{i}.png", "problem": "How many?", "answer": str(i)} for i in range(40)]
    return write_lines(tmp_path / "rows.jsonl", rows)


def test_formats_and_reasons(processor, tmp_path, capsys):
    """jsonl, parquet, a folder and a saved data set give the same rows; unusable ones are counted
    by their reason."""
    picture(3).save(tmp_path / "three.png")
    names = ("pic", "q", "a")
    bad = {
        "empty answer": (["three.png"], "?", " "),
        "prompt longer than 150 tokens": (["three.png"], "long " * 200, "1"),
        "problem is no text": (["three.png"], "", "1"),
        "the question marks 2 images and brings 1": (["three.png"], "<image><image>", "1"),
    }
    good = (["three.png"], "How many?", "3"), (["three.png"], "How <image> many?", "4")
    rows = [dict(zip(names, row)) for row in (*good, *bad.values())]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    columns = dict(image_column="pic", problem_column="q", answer_column="a", max_prompt_tokens=150)
    whole = datasets.load_dataset("json", data_files=file, split="train")
    whole.to_parquet(tmp_path / "rows.parquet")
    whole.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    whole.to_parquet(tmp_path / "folder" / "train.parquet")
    for inside in ("saved", "folder"):  # an image's path is relative to the folder
        picture(3).save(tmp_path / inside / "three.png")
    for name in ("rows.jsonl", "rows.parquet", "saved", "folder"):
        train, held_out = open_rows(processor, tmp_path / name, **columns)
        answers = [rows[i]["answer"] for rows in (train, held_out) for i in range(len(rows))]
        assert answers == ["3", "4"]
        few, _ = open_rows(processor, tmp_path / name, max_samples=2, **columns)
        assert len(few) == 1 and few[0]["images"][0].size == held_out[0]["images"][0].size
    said = capsys.readouterr().out
    assert all(said.count(f"skipped 1 rows: {reason}\n") == 4 for reason in bad)


def test_a_bug_is_no_unusable_row(processor, files, monkeypatch):
    """What papo.py does not raise for a bad row goes through."""
    monkeypatch.setattr(data, "fit_image", lambda *_: None.size)
    with pytest.raises(AttributeError):
        open_rows(processor, files)


def test_a_row_is_checked_when_it_is_drawn(processor, files, monkeypatch):
    """Before training only as many rows are encoded as are held out. The draws are the same from
    any place on, unusable rows are skipped and counted once however often they come."""
    encoded, encode = [], data.encode_prompt
    monkeypatch.setattr(data, "encode_prompt", lambda *a: (encoded.append(1), encode(*a))[1])
    rows, held_out = open_rows(processor, files, eval_size=6)
    assert len(encoded) == 6 and held_out.indices == [31, 32, 34, 35, 37, 38]
    stream, places, answers = data.RowStream(rows, seed=0), [0], []
    for _ in range(60):  # three epochs
        answers.append(int(next(stream)["answer"]))
        places.append(stream.count)
    epochs = [answers[start : start + 20] for start in (0, 20, 40)]
    assert all(set(epoch) == {i for i in range(31) if i % 3} for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    for behind in (1, 7, 20, 33):
        again = data.RowStream(open_rows(processor, files, eval_size=6)[0], seed=0)
        again.count = places[behind]
        assert [int(next(again)["answer"]) for _ in range(9)] == answers[behind : behind + 9]
    assert list(rows.skipped.values()) == ["unreadable image"] * 11


def test_an_image_that_goes_missing_during_a_run_is_skipped(processor, files, tmp_path, capsys):
    rows, held_out = open_rows(processor, files, eval_size=4)
    assert held_out.indices == [34, 35, 37, 38]
    stream = data.RowStream(rows, seed=0)
    next(stream)
    for i in range(0, 34, 2):
        (tmp_path / f"{i}.png").unlink()
    epoch = [int(next(stream)["answer"]) for _ in range(30)]
    assert set(epoch[-11:]) <= {i for i in range(34) if i % 3 and i % 2}
    for i in range(34):
        (tmp_path / f"{i}.png").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no row to train on is usable: {'unreadable image': 34}"):
        next(stream)
    assert capsys.readouterr().out.count("skipping row") == 2  # one held out, one to train on


@pytest.mark.parametrize("ending", ["avif", "dds"])
def test_a_damaged_image_of_any_codec_is_skipped(ending, processor, tmp_path):
    """Some of Pillow's decoders raise a RuntimeError."""
    path = tmp_path / f"0.{ending}"
    picture(5, mode="RGBA").save(path)
    whole = bytearray(path.read_bytes())
    if ending == "dds":
        whole[80:88] = bytes(8)  # a pixel format that there is not
    else:
        whole[len(whole) // 4 :] = bytes(len(whole) * 3 // 4)
    path.write_bytes(whole)
    row = dict(images=path.name, problem="?", answer="5")
    with pytest.raises(UserError, match="unreadable image"):
        open_rows(processor, write_lines(tmp_path / "rows.jsonl", [row] * 4))


def test_evaluation_only_skips_and_counts(folder, files, tmp_path, capsys):
    flags = ["--eval-only", "--max-new-tokens", "2", "--max-samples", "5", *SIZES]
    ts.main(["--model", folder, "--dataset", files, "--out", str(tmp_path / "eval"), *flags])
    lines = (tmp_path / "eval" / "eval.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == ["1", "2", "4"]
    assert "skipped 2 rows: unreadable image" in capsys.readouterr().out


# ---- Answers and files ---------------------------------------------------------------------------

TEXT = datasets.Value("string")
PATH_OF_GOOD = dict(images="good.png", problem="What?")


def answers_of(file, processor, **settings):
    """Every answer as read_row gives it, or the reason why not."""
    config = DataConfig(dataset=str(file), min_pixels=4704, max_pixels=15680, **settings)
    dataset, texts = open_dataset(config), []
    for i in range(len(dataset)):
        try:
            texts.append(read_row(dataset, i, config, processor)["answer"])
        except ValueError as error:
            texts.append(error.args[0])
    return texts


@pytest.mark.parametrize(
    "feature, values, texts",
    [
        (
            datasets.ClassLabel(names=["cat", "dog"]),
            [1, 0, -1, None],
            ["dog", "cat", "empty answer", "empty answer"],
        ),
        (datasets.Value("float32"), [0.1, 3.0, None], ["0.1", "3.0", "empty answer"]),
        (datasets.Value("float16"), [0.1, 2.5], ["0.1", "2.5"]),
        (datasets.Value("float64"), [0.1, float("nan")], ["0.1", "empty answer"]),
        (datasets.Value("decimal128(5, 2)"), [Decimal("1.50")], ["1.50"]),
        (datasets.Value("bool"), [True], ["answer is no text or number"]),
        (datasets.List(TEXT), [["a"]], ["answer is no text or number"]),
    ],
    ids=lambda value: getattr(value, "dtype", None) or type(value).__name__,
)
def test_an_answer_is_what_was_written(feature, values, texts, processor, tmp_path):
    picture(1).save(tmp_path / "good.png")
    features = datasets.Features(images=TEXT, problem=TEXT, answer=feature)
    rows = [PATH_OF_GOOD | dict(answer=value) for value in values]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    assert answers_of(tmp_path / "rows.parquet", processor) == texts


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "ROWS.JSONL", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.csv.gz"]
)
@pytest.mark.parametrize(
    "answers", [["2024-01-02", "2025-12-31"], ["2024-01-02 10:30:00"] * 2, ["None", "N/A"]]
)
def test_files_are_read_as_what_they_are(name, answers, processor, tmp_path):
    """Dates stay text, in each kind of file."""
    picture(1).save(tmp_path / "good.png")
    rows = [PATH_OF_GOOD | dict(answer=answer) for answer in answers]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if ".json" in name and "l" not in name:
        text = json.dumps(rows)
    if ".csv" in name:
        text = "images,problem,answer\n" + "".join(
            f"good.png,What?,{answer}\n" for answer in answers
        )
    body = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(body) if name.endswith(".gz") else body)
    assert answers_of(tmp_path / name, processor) == answers


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "rows.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"rows.zip: its ending is none of .parquet, .jsonl"):
        open_dataset(DataConfig(dataset=str(tmp_path / "rows.zip")))


def test_answers_that_cannot_be_graded_are_warned_of(processor, tmp_path, capsys):
    """If one of the held-out ones can, nothing is said."""
    picture(1).save(tmp_path / "good.png")
    for last, warned in ((r"\frac{1}{2", True), (r"\frac{1}{2}", False)):
        rows = [PATH_OF_GOOD | dict(answer=answer) for answer in ["3"] * 6 + [last] + ["$"]]
        config = DataConfig(
            dataset=write_lines(tmp_path / "rows.jsonl", rows), min_pixels=4704, max_pixels=15680
        )
        load_rows(config, processor)
        assert ("warning: no answer can be right" in capsys.readouterr().out) == warned


def test_a_run_goes_on_with_its_own_data_only(folder, tmp_path, capsys):
    """Rows that are appended or replaced would change which ones are held out."""
    picture(1).save(tmp_path / "good.png")
    rows = [PATH_OF_GOOD | dict(answer=str(i)) for i in range(8)]
    start = [
        "--dataset",
        str(tmp_path / "rows.jsonl"),
        "--out",
        str(tmp_path / "run"),
        "--eval-size",
        "1",
        *QUICK,
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    ts.main(["--model", folder, *start, "--steps", "1"])
    for changed in (rows + rows[:1], rows[:3] + [rows[3] | dict(answer="9")] + rows[4:]):
        write_lines(tmp_path / "rows.jsonl", changed)
        with pytest.raises(SystemExit, match="2"):
            ts.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "2"])
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.search(rf"is of 8 rows, \w+, --dataset has now {len(changed)} rows, \w+$", line)
    write_lines(tmp_path / "rows.jsonl", rows)
    ts.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "2"])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_an_image_at_an_address_is_asked_for_once_a_draw(folder, tmp_path, monkeypatch):
    """A second request may fail. The image is kept as small as the vision tower sees it."""
    asked, large = [], saved(picture(5, 840, 840), "PNG")
    monkeypatch.setattr(data, "fetch", lambda url: (asked.append(url), large)[1])
    ask = lambda n: dict(images=f"http://x/{n}.png", problem="How many?", answer="5")
    rows = write_lines(tmp_path / "rows.jsonl", map(ask, range(8)))
    model, processor = ts.load_model(
        ts.RunConfig(model=folder, dataset=rows, max_pixels=15680, min_pixels=4704)
    )
    rows, _ = open_rows(processor, rows)
    config = papo.PAPOConfig(group_size=2, prompts_per_batch=4, max_new_tokens=2)
    asked.clear()
    stream = data.RowStream(rows, seed=0)
    groups, _ = papo.roll_out(model, processor, config, stream, torch.Generator().manual_seed(0))
    assert len(asked) == len(set(asked)) == 4 and groups[0].masked_prompt is not None
    assert groups[0].row["images"][0].size == (112, 112)

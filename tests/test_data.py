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
from conftest import lines_of, make_processor, metrics, picture, write_lines
from PIL import Image

import papo
import train_small as ts
from program import UserError, data
from program.data import DataConfig, load_rows, open_dataset, read_row

# ---- Pictures ------------------------------------------------------------------------------------

RAMP = np.arange(0, 256, 17, dtype="uint8").repeat(4).reshape(8, 8)  # 16 greys
INK = np.tile(np.arange(8) < 3, (8, 1))  # 3 columns of ink, 5 transparent


def png(bits, kind, rows, transparent):
    """An 8 x 8 PNG of that bit depth and colour type whose tRNS chunk names one value."""

    def chunk(name, body):
        size, check = struct.pack(">I", len(body)), struct.pack(">I", zlib.crc32(name + body))
        return size + name + body + check

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, bits, kind, 0, 0, 0))
    lines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    body = chunk(b"tRNS", transparent) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def saved(image, kind, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def transparent():
    """{kind: black ink on transparent ground that would be nearly black, too}"""
    ground = lambda kind, value: np.where(INK, 0, value).astype(kind)
    black, alpha = (Image.fromarray(np.where(INK, ink, 0).astype("u1")) for ink in (0, 255))
    rgba = Image.merge("RGBA", [black] * 3 + [alpha])
    palette = Image.fromarray(ground("u1", 1)).convert("P")
    palette.putpalette([0] * 6)  # two blacks, the second of which is transparent
    return {
        "LA": saved(rgba.convert("LA"), "PNG"),
        "RGBA": saved(rgba, "PNG"),
        "palette PNG": saved(palette, "PNG", transparency=1),
        "palette GIF": saved(palette, "GIF", transparency=1),
        "grey + tRNS": png(8, 0, ground("u1", 1), struct.pack(">H", 1)),
        "grey of 16 bits + tRNS": png(16, 0, ground(">u2", 9), struct.pack(">H", 9)),
        "RGB + tRNS": png(8, 2, ground("u1", 2).repeat(3, 1), struct.pack(">HHH", 2, 2, 2)),
    }


def deep_grey():
    """{kind: the 16 greys in more than 8 bits}"""
    wide = RAMP.astype("u2") * 257
    big_endian = wide.astype(">u2").tobytes()
    return {
        "PNG": saved(Image.fromarray(wide), "PNG"),
        "TIFF": saved(Image.fromarray(wide), "TIFF"),
        "big-endian TIFF": saved(Image.frombytes("I;16B", (8, 8), big_endian), "TIFF"),
        "PGM": b"P5 8 8 65535\n" + big_endian,
        "float TIFF": saved(Image.fromarray(RAMP.astype("f4") / 255), "TIFF"),
    }


@pytest.mark.parametrize("files, grey", [(transparent, np.where(INK, 0, 255)), (deep_grey, RAMP)])
def test_a_picture_is_what_a_person_sees(files, grey, tmp_path):
    """On white ground, and in its whole range of grey."""
    for kind, file in files().items():
        image = data.as_seen(data.open_image(file, tmp_path))
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), np.stack([grey] * 3, 2), err_msg=kind)


def test_a_range_that_is_not_known_is_a_reason_to_skip(tmp_path):
    below, nan = RAMP.astype("f4") / 255 - 0.5, RAMP.astype("f4") * np.nan
    for array in (RAMP.astype("i4"), RAMP.astype("f4"), below, nan):
        image = data.open_image(saved(Image.fromarray(array), "TIFF"), tmp_path)
        with pytest.raises(ValueError, match="32-bit image of unknown range"):
            data.as_seen(image)


@pytest.fixture(scope="module")
def server():
    """Serves /good, breaks all else in ways of its own. -> address, list of what was asked"""
    asked, stop = [], threading.Event()
    good = saved(Image.fromarray(RAMP), "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/silent":
                return stop.wait(60)
            self.send_response({"/gone": 404, "/loop": 302}.get(self.path, 200))
            headers = {"/loop": ("Location", "/loop"), "/encoded": ("Transfer-Encoding", "chunked")}
            headers["/cut"] = "Content-Length", str(2 * len(good))
            if self.path in headers:
                self.send_header(*headers[self.path])
            self.end_headers()
            while self.path == "/drip" and not stop.wait(0.05):  # never silent for long
                self.wfile.write(b"x")
            odd = {"/encoded": b"no number\r\n", "/cut": good[: len(good) // 2]}
            self.wfile.write(odd.get(self.path, good))

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
    ways = [Image.open(path), path.name, str(path), path.as_uri(), whole, text]
    ways += [text[:70] + "\n" + text[70:], f"data:image/jpeg;base64,{text}", {"bytes": text}]
    ways += [{"bytes": whole, "path": None}, {"bytes": list(whole)}]
    ways += [{"bytes": None, "path": path.name}, {"bytes": None, "path": path.as_uri()}]
    for way in ways:
        image = data.as_seen(data.open_image(way, tmp_path))
        assert image.size == (24, 16) and image.getpixel((9, 9))[0] > 250, way
    turned.save(tmp_path / "turned.tiff", exif=exif)
    assert data.as_seen(data.open_image("turned.tiff", tmp_path)).size == (24, 16)
    image = data.as_seen(data.open_image(f"{server[0]}/a picture/ä?x=1&y=%20", tmp_path))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], RAMP)


# ---- Rows ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor():
    return make_processor("qwen2_5_vl")


@pytest.fixture
def write(tmp_path):
    """A function that writes rows beside good.png, which is what they show unless they say
    otherwise, and returns the file."""
    picture(1).save(tmp_path / "good.png")
    row = dict(images=["good.png"], problem="How many?", answer="3")
    return lambda *changes: write_lines(tmp_path / "rows.jsonl", [row | c for c in changes])


def open_rows(processor, file, **settings):
    return load_rows(DataConfig(dataset=str(file), **settings), processor)


def test_a_run_over_bad_pictures_ends_and_counts_them(
    server, train, write, tmp_path, monkeypatch, capsys
):
    """Each dead address is asked once, whatever it does, and costs no more than the time limit."""
    monkeypatch.setattr(data, "FETCH_SECONDS", 0.5)
    (address, asked), start = server, time.perf_counter()
    for path in ("silent", "drip"):
        with pytest.raises(ValueError, match="image cannot be fetched"):
            data.fetch(f"{address}/{path}")
    assert time.perf_counter() - start < 5
    asked.clear()
    picture(1).save(tmp_path / "whole.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    Image.new("RGB", (1, 300)).save(tmp_path / "thread.png")
    Image.fromarray(RAMP.astype("i4")).save(tmp_path / "deep.tiff")
    dead = [f"{address}/{path}" for path in ("gone", "loop", "silent", "drip", "encoded")]
    dead += ["http://127.0.0.1:9/x.png", "http://nobody.invalid/x.png"]
    dead += ["s3://bucket/x.png", "file:///nowhere/x.png"]
    broken = ["damaged.png", "missing.png", f"{address}/cut", "data:image/png;base64,????"]
    images = [[image] for image in dead + broken + ["deep.tiff", "thread.png"]]
    bad = [dict(images=x, problem="What is <image> here?") for x in [*images, [], ["good.png"] * 2]]
    train(flags="--steps 1 --eval-size 1", dataset=write(*bad, {}, {}))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped ")]
    reasons = """
        9 rows: image cannot be fetched
        4 rows: unreadable image
        1 rows: 32-bit image of unknown range
        1 rows: image more than 200 times longer than wide
        1 rows: no image
        1 rows: the question marks 1 images and brings 2"""
    assert sorted(said) == sorted(f"skipped {x.strip()}" for x in reasons.strip().splitlines())
    once = [path for path in asked if path != "/loop"]
    assert len(once) == len(set(once)) >= 5


def test_a_question_about_several_images(one_vlm, processor, train, write, tmp_path, monkeypatch):
    """Each picture stands at its mark; in a run all are masked, afresh, and shown."""
    picture(1, 56, 84).save(tmp_path / "a.png")
    picture(2, 112, 84).save(tmp_path / "b.png")
    asked = ["a.png"], ["b.png", "a.png"], ["a.png", "b.png"]
    problems = "What?", "Is <image> more than <image>?", "Both?"
    file = write(*[dict(images=i, problem=p) for i, p in zip(asked, problems)] * 4)
    config = DataConfig(dataset=file)
    one, two, first = (read_row(open_dataset(config), i, config, processor) for i in range(3))
    assert [image.size for image in two["images"]] == [(112, 84), (56, 84)]
    assert two["prompt"]["image_grid_thw"].tolist() == [[1, 6, 8], [1, 6, 4]]
    text_of = lambda row: processor.tokenizer.decode(row["prompt"]["input_ids"][0])
    pieces = text_of(two).split("<|vision_start|>")
    assert [piece.count("<|image_pad|>") for piece in pieces] == [0, 12, 6]
    assert "more than" in pieces[1] and "Both?" in text_of(first).split("<|vision_end|>")[2]

    masks, seeds, mask_patches = [], set(), papo.mask_patches

    def note(image, ratio, size, generator):
        masks.append(mask_patches(image, ratio, size, generator))
        seeds.add(id(generator))
        return masks[-1]

    monkeypatch.setattr(papo, "mask_patches", note)
    out = train(flags="--steps 1 --eval-size 3", dataset=file)
    line = metrics(out)[1]
    assert line["kl_prcp"] > 0 and line["grad_norm"] > 0 and line["skipped"] == 0
    page = (out / "samples.html").read_text()
    assert page.count('alt="image"') == page.count('alt="masked image"') == 5
    masks.clear(), seeds.clear()
    ts.evaluate(*one_vlm, papo.PAPOConfig(max_new_tokens=2), [one, two], masked=True)
    assert [mask.size for mask in masks] == [(56, 84), (112, 84), (56, 84)] and len(seeds) == 1
    assert all((np.asarray(mask).reshape(-1, 3).sum(1) == 0).any() for mask in masks)
    assert not np.array_equal(np.asarray(masks[0]), np.asarray(masks[2]))


@pytest.fixture
def files(write, tmp_path):
    """A jsonl of 40 rows, each with an image file of its own; the answer is the row's number. Every
    third image is damaged."""
    for i in range(40):
        path = tmp_path / f"{i}.png"
        picture(i).save(path)
        if i % 3 == 0:
            path.write_bytes(path.read_bytes()[:60])
    return write(*[dict(images=f"{i}.png", answer=str(i)) for i in range(40)])


def test_formats_and_reasons(processor, write, tmp_path, capsys):
    """jsonl, parquet, a folder and a saved data set give the same rows; unusable ones are counted
    by their reason."""
    bad = {
        "empty answer": dict(answer=" "),
        "prompt longer than 150 tokens": dict(problem="long " * 200),
        "problem is no text": dict(problem=""),
        "the question marks 2 images and brings 1": dict(problem="<image><image>"),
    }
    file = write({}, dict(problem="How <image> many?", answer="4"), *bad.values())
    whole = datasets.load_dataset("json", data_files=file, split="train")
    columns = dict(images="pic", problem="q", answer="a")
    whole = whole.rename_columns(columns)
    whole.to_json(file)
    whole.to_parquet(tmp_path / "rows.parquet")
    whole.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    whole.to_parquet(tmp_path / "folder" / "train.parquet")
    for inside in ("saved", "folder"):  # an image's path is relative to the folder
        picture(1).save(tmp_path / inside / "good.png")
    given = dict(image_column="pic", problem_column="q", answer_column="a", max_prompt_tokens=150)
    for name in ("rows.jsonl", "rows.parquet", "saved", "folder"):
        train, held_out = open_rows(processor, tmp_path / name, **given)
        answers = [rows[i]["answer"] for rows in (train, held_out) for i in range(len(rows))]
        assert answers == ["3", "4"]
        few, _ = open_rows(processor, tmp_path / name, max_samples=2, **given)
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
def test_a_damaged_image_of_any_codec_is_skipped(ending, processor, write, tmp_path):
    """Some of Pillow's decoders raise a RuntimeError."""
    path = tmp_path / f"0.{ending}"
    picture(5, mode="RGBA").save(path)
    whole = bytearray(path.read_bytes())
    if ending == "dds":
        whole[80:88] = bytes(8)  # a pixel format that there is not
    else:
        whole[len(whole) // 4 :] = bytes(len(whole) * 3 // 4)
    path.write_bytes(whole)
    with pytest.raises(UserError, match="unreadable image"):
        open_rows(processor, write(*[dict(images=path.name)] * 4))


def test_evaluation_only_skips_and_counts(train, files, capsys):
    out = train(flags="--eval-only --max-samples 5", dataset=files)
    assert [line["answer"] for line in lines_of(out / "eval.jsonl")] == ["1", "2", "4"]
    assert "skipped 2 rows: unreadable image" in capsys.readouterr().out


# ---- Answers and files ---------------------------------------------------------------------------

TEXT = datasets.Value("string")


def answers_of(file, processor):
    """Every answer as read_row gives it, or the reason why not."""
    config = DataConfig(dataset=str(file))
    dataset, texts = open_dataset(config), []
    for i in range(len(dataset)):
        try:
            texts.append(read_row(dataset, i, config, processor)["answer"])
        except ValueError as error:
            texts.append(error.args[0])
    return texts


EMPTY, ODD = "empty answer", "answer is no text or number"
PET = datasets.ClassLabel(names=["cat", "dog"])


@pytest.mark.parametrize(
    "feature, values, texts",
    [
        (PET, [1, 0, -1, None], ["dog", "cat", EMPTY, EMPTY]),
        ("float32", [0.1, 3.0, None], ["0.1", "3.0", EMPTY]),
        ("float16", [0.1, 2.5], ["0.1", "2.5"]),
        ("float64", [0.1, float("nan")], ["0.1", EMPTY]),
        ("decimal128(5, 2)", [Decimal("1.50")], ["1.50"]),
        ("bool", [True], [ODD]),
        (datasets.List(TEXT), [["a"]], [ODD]),
    ],
)
def test_an_answer_is_what_was_written(feature, values, texts, processor, write, tmp_path):
    feature = datasets.Value(feature) if isinstance(feature, str) else feature
    features = datasets.Features(images=TEXT, problem=TEXT, answer=feature)
    rows = [dict(images="good.png", problem="What?", answer=value) for value in values]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    assert answers_of(tmp_path / "rows.parquet", processor) == texts


@pytest.mark.parametrize("name", "rows.jsonl ROWS.JSONL rows.json rows.csv".split())
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "answers", [["2024-01-02", "2025-12-31"], ["2024-01-02 10:30:00"] * 2, ["None", "N/A"]]
)
def test_files_are_read_as_what_they_are(name, packed, answers, processor, write, tmp_path):
    """Dates stay text, in each kind of file."""
    rows = [dict(images="good.png", problem="What?", answer=answer) for answer in answers]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".json"):
        text = json.dumps(rows)
    if name.endswith(".csv"):
        text = "images,problem,answer\n" + "".join(f"good.png,What?,{x}\n" for x in answers)
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert answers_of(path, processor) == answers


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "rows.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"rows.zip: its ending is none of .parquet, .jsonl"):
        open_dataset(DataConfig(dataset=str(tmp_path / "rows.zip")))


def test_answers_that_cannot_be_graded_are_warned_of(processor, write, capsys):
    """If one of the held-out ones can, nothing is said."""
    for last, warned in ((r"\frac{1}{2", True), (r"\frac{1}{2}", False)):
        open_rows(processor, write(*[{}] * 6, dict(answer=last), dict(answer="$")))
        assert ("warning: no answer can be right" in capsys.readouterr().out) == warned


def test_a_run_goes_on_with_its_own_data_only(train, write, capsys):
    """Rows that are appended or replaced would change which ones are held out."""
    rows = [dict(answer=str(i)) for i in range(8)]
    train(dataset=(file := write(*rows)), flags="--steps 1")
    for changed in (rows + rows[:1], rows[:3] + [dict(answer="9")] + rows[4:]):
        write(*changed)
        with pytest.raises(SystemExit, match="2"):
            train(flags="--resume --steps 2", dataset=file)
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.search(rf"is of 8 rows, \w+, --dataset has now {len(changed)} rows, \w+$", line)
    write(*rows)
    assert len(metrics(train(flags="--resume --steps 2", dataset=file))) == 3


def test_an_image_at_an_address_is_asked_for_once_a_draw(one_vlm, write, monkeypatch):
    """A second request may fail. The image is kept as small as the vision tower sees it."""
    asked, large = [], saved(picture(5, 840, 840), "PNG")
    monkeypatch.setattr(data, "fetch", lambda url: (asked.append(url), large)[1])
    rows, _ = open_rows(one_vlm[1], write(*[dict(images=f"http://x/{n}.png") for n in range(8)]))
    config = papo.PAPOConfig(group_size=2, prompts_per_batch=4, max_new_tokens=2)
    asked.clear()
    stream = data.RowStream(rows, seed=0)
    groups, _ = papo.roll_out(*one_vlm, config, stream, torch.Generator().manual_seed(0))
    assert len(asked) == len(set(asked)) == 4 and groups[0].masked_prompt is not None
    assert groups[0].row["images"][0].size == (112, 112)

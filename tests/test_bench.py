"""study/bench.py: what its ratios compare is the same work, and its counts are right."""

import json
import math

import pytest
import torch
from conftest import random_responses, two_prompts
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

import papo
from study import bench


@pytest.fixture
def works(monkeypatch):
    monkeypatch.setattr(bench, "PAIRS", 1)
    return bench.make_works()


def test_a_group_as_one_row_is_the_same_work(one_vlm):
    """The same log-probabilities; visible scores counted in the model's mask, and from the rule."""
    model, processor = one_vlm
    for prompt in two_prompts(processor):
        responses = random_responses(processor, [4, 1, 6])
        logps, _ = papo.group_logps(model, prompt, responses)
        for row, alone in zip(logps, bench.padded_logps(model, prompt, responses), strict=True):
            torch.testing.assert_close(row[: len(alone)], alone, atol=2e-5, rtol=1e-4)
        mask = papo.group_row(model, prompt, responses)[0]["attention_mask"]
        P = prompt["input_ids"].shape[1]
        owner = [0] * P + [1] * 4 + [2] + [3] * 6
        by_hand = sum(owner[k] in (0, owner[q]) for q in range(P + 11) for k in range(q + 1))
        assert bench.visible_scores(P, [4, 1, 6]) == int((mask == 0).sum()) == by_hand


def test_the_works_are_as_stated_and_no_response_ends_early(works):
    grids = [work.prompts(1)[0]["image_grid_thw"].prod().item() // 4 for work in works]
    text, work = works[2].model.config.text_config, works[0]
    assert grids == [4, 256, 256] and 8 * text.vocab_size == 151936
    assert [8 * text.hidden_size, 8 * text.intermediate_size] == [2048, 11008]
    given = work.model, work.processor, work.prompts(2), 3, 40
    ours, theirs = papo.sample_groups(*given), bench.generate(*given)
    assert [len(o) for group in ours for o in group] == [40] * 6 and theirs.shape == (6, 40)
    assert not torch.isin(theirs, torch.tensor(papo.vision_token_ids(work.model))).any()
    assert len({tuple(row) for row in theirs.tolist()}) == 6  # drawn, not greedy


def printed(tables, rows, capsys):
    """The Markdown tables as printed, each with as many cells in each row as columns."""
    for (title, columns, _), made in zip(tables, rows, strict=True):
        bench.print_table(title, columns.split(", "), made)
    texts = capsys.readouterr().out.split("###")[1:]
    for text in texts:
        head, rule, *lines = text.strip().splitlines()[2:]
        assert lines and {line.count("|") for line in (rule, *lines)} == {head.count("|")}
    return texts


def test_every_table_is_printed(works, capsys):
    rows = (
        bench.group_rows(works[:1], lengths=(6,), groups=(4,)),
        bench.training_steps(works[:1], questions=(1,), tokens=4),
        bench.gated_steps(works[0].model, works[0].processor, "--prompts-per-batch=2"),
        bench.sampling(works[:1], questions=(1,), tokens=4),
        [("one", "two", "three", "four")],
    )
    tables = "".join(printed(bench.TABLES, rows, capsys))
    assert tables.count("| embedded world | ") == 3


def test_trl_trains_with_one_config_on_as_many_responses_of_full_length(works, monkeypatch, capsys):
    pytest.importorskip("trl", reason="needs requirements-trl.txt", exc_type=ImportError)
    import papo_trl

    ours, theirs, compute_loss = [], [], papo_trl.PAPOTrainer._compute_loss
    papo_step = papo.papo_step

    def step(model, optimizer, config, groups, *rest):
        ours.append((vars(config), [len(o) for group in groups for o in group.responses]))
        return papo_step(model, optimizer, config, groups, *rest)

    def loss(self, model, inputs):
        theirs.append((vars(self.papo), inputs["completion_mask"].sum(1).tolist()))
        return compute_loss(self, model, inputs)

    monkeypatch.setattr(papo, "papo_step", step)
    monkeypatch.setattr(papo_trl.PAPOTrainer, "_compute_loss", loss)
    rows = bench.trl_steps(works[:1], questions=(1,), tokens=4)
    assert "| embedded world | 1 x 8 x 4 | " in printed([bench.TRL_TABLE], [rows], capsys)[0]
    assert ours == theirs and [lengths for _, lengths in ours] == [[4] * 8] * 2


def test_without_trl_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--trl"])
    assert "--trl needs trl: pip install -r requirements-trl.txt\n" in capsys.readouterr().err


@pytest.fixture(params=[80, 24])
def tiny_run(request):
    """The run of `--gpu --size tiny`: all weights are trained, or an adapter on frozen ones."""
    trainer, rows, P, grid, _ = bench.gpu_run(request.param, "tiny")
    trainer.model.train()
    return trainer, rows, P, grid


def counted(work, *given):
    """What torch counts of a work's FLOPs on a CPU, where it knows only the plain attention. Its
    stopping early would leave out a layer's last product when a layer is computed again. Outer
    products count nothing: older transformers make rotary angles by them, newer ones do not."""
    products = lambda a, b, **_: 2 * math.prod(a) * b[2] * (a[2] > 1)  # (B, n, k) @ (B, k, m)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: products}) as counter:
        with sdpa_kernel(SDPBackend.MATH), set_checkpoint_early_stop(False):
            work(*given)
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts(tiny_run):
    """A group's row forward, and with gradient checkpointing forward, backward and again."""
    trainer, rows, P, grid = tiny_run
    model, responses = trainer.model, [torch.full((n,), 9) for n in (3, 8, 5)]
    prompt = papo.encode_image_if_frozen(model, rows[0]["prompt"])
    seen = bench.vision_flops(model, grid) if "pixel_values" in prompt else (0, 0, 0)
    forward, backward = bench.text_flops(model, P + 16, (P + 16) ** 2, 16)
    score = lambda: papo.group_logps(model, prompt, responses)[0].sum()
    assert counted(torch.no_grad()(score)) == forward + seen[0]
    assert counted(lambda: score().backward()) == 2 * forward + backward + sum(seen)


def test_a_batchs_flops_are_those_of_its_phases(tiny_run, monkeypatch):
    """Counted while each phase runs, without checkpointing, and with the masked scores, which the
    formula leaves out otherwise. It also leaves out that the head is always computed again, and
    that the reference policy has no adapter."""
    trainer, given, P, grid = tiny_run
    model, config, results = trainer.model, trainer.config, []
    model.gradient_checkpointing_disable()
    monkeypatch.setattr(bench, "visible_scores", lambda P, lengths: (P + sum(lengths)) ** 2)
    flops, (n, G, T) = bench.phase_flops(model, config, P, grid), (len(given), 5, 8)
    again = 2 * n * G * T * bench.matrices(model.get_output_embeddings())
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora" in name)
    more = dict(sample=0, score=-2 * n * (P + G * T) * adapter, update=again)
    for name, correction in more.items():
        phase = getattr(bench, f"{name}_phase")
        found = counted(lambda: results.append(phase(trainer, config, given)))
        assert found == flops[name] + correction
        given = results[-1]


def gpu_table(monkeypatch, capsys, tmp_path, *flags):
    """What `--gpu --size tiny` prints, as rows of cells, and its lines of JSON."""
    monkeypatch.setattr(bench, "DEVICE", torch.device("cpu"))
    path = tmp_path / "rows.jsonl"
    bench.main(["--gpu", "--size=tiny", f"--json={path}", *flags])
    printed = capsys.readouterr().out.splitlines()
    cells = [line.strip("| ").split(" | ") for line in printed if line[:3] in ("| 8", "| 4", "| 2")]
    return cells, list(map(json.loads, path.read_text().splitlines()))


def test_one_batch_on_a_gpu_in_miniature(monkeypatch, capsys, tmp_path):
    """Each phase of GRPO and PAPO at each setting; an out-of-memory error costs its setting only."""
    update, calls = bench.update_phase, []

    def short_of_memory(trainer, config, groups):
        calls.append([len(o) for group in groups for o in group.responses])
        if trainer.run.gpu_memory == 80 and config.gamma and len(calls) > 1:
            raise torch.OutOfMemoryError
        return update(trainer, config, groups)

    monkeypatch.setattr(bench, "update_phase", short_of_memory)
    cells, lines = gpu_table(monkeypatch, capsys, tmp_path)
    phases = ["sample", "score", "update", "step"]
    expected = [("GRPO", phase) for phase in phases] + [("PAPO", phase) for phase in phases]
    for memory in (80, 48, 24):
        rows = [line for line in lines if line["setting"] == memory]
        found = [(row["method"], row["phase"]) for row in rows]
        assert found == (expected[:6] + [("out of memory", "")] if memory == 80 else expected)
        assert all(float(row["seconds"]) > 0 and row["MFU %"] == "" for row in rows[:4])
        assert float(rows[3]["peak GiB"]) > 0.1 and rows[3]["over GRPO"] == "1.00"
    assert len(cells) == len(lines) == 23 and calls[1] == [8] * 15  # none ended early


def test_mfu_is_flops_over_the_cards(monkeypatch):
    """Of a card known by name: 2 TFLOP in half a second on an A100 of 312 TFLOP/s are 1.3 %."""
    monkeypatch.setattr(bench, "device_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(bench, "one_batch", lambda *_: iter([("sample", 0.5, 1.0)]))
    flops = dict.fromkeys(("sample", "step"), 2e12)
    monkeypatch.setattr(bench, "phase_flops", lambda *_: flops)
    rows = list(bench.setting_rows(24, "tiny", 0))
    assert [row[5] for row in rows] == ["1.3"] * 4 and rows[0][4] == "240"  # 15 x 8 tokens


def test_the_minutes_bound_the_measurement(monkeypatch, capsys, tmp_path):
    cells, lines = gpu_table(monkeypatch, capsys, tmp_path, "--minutes=0")
    assert [line["method"] for line in lines] == ["out of time"] * 3


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(bench, "DEVICE", torch.device("cpu"))
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--gpu"])
    error = "study.bench: error: --gpu finds no GPU; --size tiny tries it on a CPU\n"
    assert capsys.readouterr() == ("", error)


def test_the_3b_has_the_published_sizes(monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", torch.device("meta"))
    model = bench.qwen_3b(bench.toy.toy_processor())
    vision = model.config.vision_config
    assert sum(p.numel() for p in model.parameters()) == 3_754_622_976
    assert vision.fullatt_block_indexes == [7, 15, 23, 31] and vision.window_size == 112

"""study/bench.py: what its ratios compare is the same work, and its counts are right."""

from itertools import product

import pytest
import torch
from conftest import random_responses, two_prompts

import papo
import train_small
from study import bench


@pytest.fixture(scope="module")
def works():
    return bench.make_works()


def test_both_layouts_compute_the_same_log_probabilities(one_vlm):
    model, processor = one_vlm
    for prompt in two_prompts(processor):
        responses = random_responses(processor, [5, 1, 3])
        logps, _ = papo.group_logps(model, prompt, responses)
        for row, alone in zip(logps, bench.padded_logps(model, prompt, responses), strict=True):
            torch.testing.assert_close(row[: len(alone)], alone, atol=2e-5, rtol=1e-4)


def test_visible_scores_are_those_of_group_rows_own_mask(one_vlm):
    """Counted in the mask the model is given, and pair by pair from the rule."""
    model, processor = one_vlm
    prompt, responses = two_prompts(processor)[0], random_responses(processor, [4, 1, 6])
    P = prompt["input_ids"].shape[1]
    mask = papo.group_row(model, prompt, responses)[0]["attention_mask"]
    owner = [0] * P + [1] * 4 + [2] + [3] * 6
    pairs = product(range(len(owner)), repeat=2)
    by_hand = sum(key <= query and owner[key] in (0, owner[query]) for query, key in pairs)
    assert bench.visible_scores(P, [4, 1, 6]) == int((mask == 0).sum()) == by_hand


def test_no_response_ends_early_either_way(works):
    work = works[0]
    torch.manual_seed(0)
    prompts = work.prompts(2)
    ours = papo.sample_groups(work.model, work.processor, prompts, 3, 40)
    theirs = bench.generate(work.model, work.processor, prompts, 3, 40)
    assert [len(o) for group in ours for o in group] == [40] * 6 and theirs.shape == (6, 40)
    never = torch.tensor(papo.vision_token_ids(work.model))
    assert not torch.isin(theirs, never).any()
    assert len({tuple(row) for row in theirs.tolist()}) == 6  # drawn, not greedy


def test_the_works_have_the_stated_sizes(works):
    grids = [work.prompts(1)[0]["image_grid_thw"].prod().item() // 4 for work in works]
    assert grids == [4, 256, 256]  # visual tokens
    text = works[2].model.config.text_config
    assert [text.hidden_size * 8, text.intermediate_size * 8, text.vocab_size * 8] == [
        2048,
        11008,
        151936,
    ]


def test_every_table_is_printed(works, monkeypatch, capsys):
    monkeypatch.setattr(bench, "PAIRS", 1)
    small, model, processor = works[:1], works[0].model, works[0].processor
    made = (
        bench.group_rows(small, lengths=(6,), groups=(4,)),
        bench.training_steps(small, questions=(1,), tokens=4),
        bench.gated_steps(model, processor, "--prompts-per-batch=2", "--group-size=2"),
        bench.sampling(small, questions=(1,), tokens=4),
        [("one", "two", "three", "four")],
    )
    for (title, columns, _), rows in zip(bench.TABLES, made, strict=True):
        bench.print_table(title, columns.split(", "), rows)
    tables = tables_in(capsys.readouterr().out)
    assert sum("| embedded world | " in table for table in tables) == 3


def tables_in(text):
    """The Markdown tables of a printout, each with as many cells in each row as columns."""
    tables = text.split("###")[1:]
    for table in tables:
        head, rule, *rows = table.strip().splitlines()[2:]
        assert rows and {line.count("|") for line in (rule, *rows)} == {head.count("|")}
    return tables


def test_trl_does_the_same_work(works, monkeypatch, capsys):
    """Both sides train with one config on as many responses, all of full length."""
    reason = "trl is not installed: pip install -r requirements-trl.txt"
    pytest.importorskip("trl", reason=reason, exc_type=ImportError)
    import papo_trl

    monkeypatch.setattr(bench, "PAIRS", 1)
    ours, theirs, compute_loss = [], [], papo_trl.PAPOTrainer._compute_loss

    def step(model, optimizer, config, groups, *rest):
        ours.append((vars(config), [len(o) for group in groups for o in group.responses]))
        return papo.papo_step(model, optimizer, config, groups, *rest)

    def loss(self, model, inputs):
        theirs.append((vars(self.papo), inputs["completion_mask"].sum(1).tolist()))
        return compute_loss(self, model, inputs)

    monkeypatch.setattr(train_small, "papo_step", step)
    monkeypatch.setattr(papo_trl.PAPOTrainer, "_compute_loss", loss)
    title, columns, rows = bench.TRL_TABLE
    bench.print_table(title, columns.split(", "), rows(works[:1], questions=(1,), tokens=4))
    assert ours == theirs and [lengths for _, lengths in ours] == [[4] * 8] * 2
    [table] = tables_in(capsys.readouterr().out)
    assert "| embedded world | 1 x 8 x 4 | " in table


def test_without_trl_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        bench.main(["--trl"])
    assert stop.value.code == 2
    error = "study.bench: error: --trl needs trl: pip install -r requirements-trl.txt\n"
    assert capsys.readouterr() == ("", error)

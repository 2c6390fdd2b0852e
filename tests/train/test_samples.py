"""Sample answers: written at every evaluation, exactly once whatever happens, and without a trace in what is trained."""

from pathlib import Path

import numpy as np
import pytest
import torch

import packs
from json_lines import read_lines
from train.runtime.signals import Stopped
from train.store.layout import RunDir
from train.store.storage import append_lines
from train.trainer.samples import answer_start, without_shared_lines


def answered_steps(run: RunDir) -> list[int]:
    return [line["step"] for line in read_lines(run.samples)]


def test_every_evaluation_has_its_answers_to_the_same_prompts(tmp_path: Path) -> None:
    data = packs.random_data()
    packs.train(tmp_path, packs.tiny_base(torch.float32), packs.DIVERSE, data=data, decoder=packs.DECODER)
    for run in packs.run_dirs(tmp_path):
        lines = read_lines(run.samples)
        evaluated = [line["step"] for line in read_lines(run.journal) if "eval_loss" in line]
        assert [line["step"] for line in lines] == evaluated
        for line in lines:
            assert [sample["row"] for sample in line["samples"]] == [0, 3, 6, 9]
            for sample in line["samples"]:
                tokens, labels = data.eval.example(sample["row"])
                start = answer_start(labels)
                assert sample["prompt"] == packs.DECODER.decode(tokens[:start])
                assert sample["expected"] == packs.DECODER.decode(tokens[start:])
                answer = [int(word) for word in sample["answer"].split()]
                assert 1 <= len(answer) <= 32
                assert sample["whole"] == (answer[-1] in packs.DECODER.ends)
    first, *others = [read_lines(run.samples)[0] for run in packs.run_dirs(tmp_path)]
    assert all(other == first for other in others), "before the first step the base answers, for all the same"


def test_they_leave_no_trace_in_training(tmp_path: Path) -> None:
    packs.train(tmp_path / "with", packs.tiny_base(torch.float32), packs.DIVERSE, decoder=packs.DECODER)
    packs.train(tmp_path / "without", packs.tiny_base(torch.float32), packs.DIVERSE)
    trained = packs.remains(tmp_path / "with")
    assert {name: content for name, content in trained.items() if "samples" not in name} == packs.remains(
        tmp_path / "without"
    )
    assert sum("samples" in name for name in trained) == len(packs.DIVERSE)


@pytest.mark.slow
def test_stopped_anywhere_and_resumed_each_answer_is_there_once(tmp_path: Path) -> None:
    """Also in the middle of an answer; and killed after lines that no checkpoint has."""
    base = packs.tiny_base(torch.float32)
    configs = [packs.run_config(train={"max_steps": 9, "eval_steps": 4, "seed": seed}) for seed in range(2)]
    packs.train(tmp_path / "undisturbed", base, configs, decoder=packs.DECODER)
    expected = [run.samples.read_bytes() for run in packs.run_dirs(tmp_path / "undisturbed")]
    stopped_while_answering = 0
    for looks in range(1, 90, 4):
        folder = tmp_path / f"stopped{looks}"
        pack = packs.make_loop(folder, base, configs, stop=packs.StopAfter(looks), decoder=packs.DECODER)
        with pytest.raises(Stopped) as stopped:
            pack.run()
        stopped_while_answering += any(entry.name == "generate" for entry in stopped.traceback)
        for session in pack.sessions:
            session.end("preempted", "SIGTERM")
            append_lines(session.dir.samples, [{"step": 8, "samples": "of a killed attempt"}])
        packs.train(folder, base, configs, decoder=packs.DECODER)
        assert [run.samples.read_bytes() for run in packs.run_dirs(folder)] == expected, looks
    assert stopped_while_answering > 3


def test_none_are_given_where_none_are_wanted(tmp_path: Path) -> None:
    configs = [packs.run_config(train={"max_steps": 2, "sample_prompts": prompts}) for prompts in (0, 2)]
    packs.train(tmp_path, packs.tiny_base(torch.float32), configs, decoder=packs.DECODER)
    silent, asked = packs.run_dirs(tmp_path)
    assert not silent.samples.exists()
    assert answered_steps(asked) == [0, 2]
    assert [len(line["samples"]) for line in read_lines(asked.samples)] == [2, 2]


def test_no_run_gets_more_tokens_than_it_asked_for(tmp_path: Path) -> None:
    decoder = packs.AnswerDecoder(packs.DECODER.decode, frozenset())
    configs = [packs.run_config(train={"max_steps": 1, "sample_tokens": tokens}) for tokens in (1, 5)]
    packs.train(tmp_path, packs.tiny_base(torch.float32), configs, decoder=decoder)
    lengths = [
        {len(sample["answer"].split()) for line in read_lines(run.samples) for sample in line["samples"]}
        for run in packs.run_dirs(tmp_path)
    ]
    assert lengths == [{1}, {5}]


def test_what_changes_no_result_is_in_no_id() -> None:
    ids = {packs.run_config(train={"sample_prompts": n, "sample_tokens": 1 + n}).run_id() for n in range(3)}
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("labels", "start"),
    [
        ([-100, -100, 5, 6], 2),
        # Of a conversation the last answer.
        ([-100, 5, -100, 6, 7], 3),
        # Nothing masked: half of it asks.
        ([4, 5, 6, 7], 2),
        ([4, -100, -100, 7], 3),
        ([4, -100], 1),
    ],
)
def test_the_prompt_ends_where_the_last_answer_begins(labels: list[int], start: int) -> None:
    assert answer_start(np.array(labels)) == start


def test_what_all_prompts_share_is_left_off() -> None:
    texts = ["system\nBe brief.\nuser\nSort 2 1\nassistant", "system\nBe brief.\nuser\nAdd 2 1\nplease\nassistant"]
    assert without_shared_lines(texts) == ["Sort 2 1", "Add 2 1\nplease"]
    assert without_shared_lines(texts[:1]) == texts[:1]
    assert without_shared_lines(["the same", "the same"]) == ["the same", "the same"]
    assert without_shared_lines([]) == []

"""What the end of a run says of its final model."""

import pytest
from safetensors.torch import load_file
from test_training import train, write_recipe
from transformers import TrainerState

from vanilla_transformer.training.results import final_checkpoint
from vanilla_transformer.training.settings.arguments import TrainingArguments


def said(scores: dict[int, float], best: int | None, metric: str = "bleu") -> str:
    """What is said after evaluations with these scores, by their updates."""
    log = [{"step": step, f"eval_{metric}": score, "eval_loss": 1.0} for step, score in scores.items()]
    state = TrainerState(
        log_history=[*log, {"step": 99, "loss": 2.0}],
        best_metric=None if best is None else scores[best],
        best_global_step=best,
        best_model_checkpoint=None if best is None else f"runs/mine/checkpoint-{best}",
    )
    return final_checkpoint(TrainingArguments(output_dir="none", metric_for_best_model=metric), state)


SAID = {
    "the best": (
        {10: 1.0, 20: 12.345, 30: 3.0},
        20,
        "the final model is checkpoint-20, with bleu 12.35, the best of 3 evaluations",
    ),
    "the only one": ({10: 0.0}, 10, "the final model is checkpoint-10, with bleu 0, the best of 1 evaluation"),
    "always 0": (
        {10: 0.0, 20: 0.0},
        10,
        "the final model is checkpoint-10, with bleu 0: it is the first of 2 evaluations, and all had this bleu. The "
        "model may need more updates; metric_for_best_model: loss chooses by the loss",
    ),
    "worse and worse": (
        {10: 3.0, 20: 2.0},
        10,
        "the final model is checkpoint-10, with bleu 3: it is the first of 2 evaluations, and bleu never improved "
        "after it",
    ),
    "not a number": (
        {10: float("nan")},
        None,
        "the final model is that of the last update: no checkpoint was chosen by bleu",
    ),
}


@pytest.mark.parametrize(("scores", "best", "words"), SAID.values(), ids=SAID)
def test_the_final_model_is_named_with_its_score(scores, best, words):
    assert said(scores, best) == words


def test_a_run_whose_metric_is_always_0_says_that_its_first_checkpoint_is_the_final_model(tmp_path):
    argv = "--learning_rate 1e-9 --max_steps 4 --eval_steps 2 --save_steps 2 --metric_for_best_model exact_match"
    told = train(write_recipe(tmp_path), *argv.split()).stderr
    (line,) = [line for line in told.splitlines() if line.startswith("the final model is ")]
    assert line.startswith("the final model is checkpoint-2, with exact_match 0: it is the first of 2 evaluations, and")
    run = tmp_path / "run"
    final, first, last = (load_file(run / name / "model.safetensors") for name in (".", "checkpoint-2", "checkpoint-4"))
    assert all(value.equal(first[name]) for name, value in final.items())
    assert any(not value.equal(last[name]) for name, value in final.items())

"""`dwindle distill`: train a student to follow its teacher, live or from a cache; or say what that would take."""

from __future__ import annotations

import shutil
from typing import Any

import click

from dwindle.errors import RecipeError
from dwindle.pipeline.commands.shared import (
    data_option,
    device_option,
    emit,
    json_option,
    load,
    made_options,
    memory_option,
    model_option,
    model_place,
    notify,
    save,
    seed_option,
    split_settings,
)
from dwindle.storage import beside

__all__ = ["distill"]


@click.command()
@click.option("-t", "--teacher", help="Teacher: folder or Hugging Face id. Not needed if --cache has all of the text.")
@click.option(
    "--offload-teacher",
    is_flag=True,
    help="Leave the teacher's weights on the disk and read them layer by layer: it may be larger than memory.",
)
@model_option
@data_option("Training text: files, folders or data set ids.", required=False)
@click.option("-o", "--output", type=click.Path(), help="Folder to write.")
@click.option("--loss", "losses", multiple=True, metavar="NAME[=WEIGHT]",
              help="forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, top_k, taid, top1_blend, "
              "label_cross_entropy, hidden_states; several are added.  [default: forward_kl]")  # fmt: skip
@click.option("--tokens", help="Tokens to train on, as in 20M.  [default: the text once]")
@click.option("--learning-rate", help="Peak learning rate.  [default: 1e-3]")
@click.option("--batch-size", help="Windows per step.  [default: 32]")
@click.option("--cache", type=click.Path(), help="Train from this logit cache; what is missing in it is written first.")
@click.option("--on-policy", metavar="SHARE", help="Share of the windows that the student writes itself.")
@click.option(
    "--text", type=click.Path(), help="Held-out text to measure on: at the end, and every evaluate_every steps."
)
@click.option("--plan", "only_plan", is_flag=True, help="Say what it would take per GPU, and stop; nothing is loaded.")
@click.option("--gpus", type=int, default=8, show_default=True, help="Processes, for --plan.")
@click.option("--gpu", default="h100-80gb", show_default=True, help="Kind of GPU, for --plan.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE",
              help="Any other key of a recipe's distill step, as in precision=bf16, or of its data, as in "
              "data.context=512.")  # fmt: skip
@seed_option
@device_option
@memory_option
@json_option
def distill(
    teacher: str | None, offload_teacher: bool, model: str, data: tuple[str, ...], output: str | None, text: str | None,
    only_plan: bool, gpus: int, gpu: str, settings: tuple[str, ...], torch_device: str, as_json: bool, **values: Any,
) -> None:  # fmt: skip
    """Train a student to follow its teacher. Cut off, it goes on from its last checkpoint.

    \b
    dwindle distill -t TEACHER -m STUDENT -d TEXT -o OUT
    dwindle distill -t TEACHER -m STUDENT -d TEXT -o OUT --cache CACHE
    dwindle distill -t TEACHER -m STUDENT -d TEXT -o OUT --loss jsd --on-policy 0.5
    dwindle distill -t TEACHER -m STUDENT --plan --gpus 8 --tokens 1B --set precision=bf16
    """
    from dwindle import distill as room

    own, of_data = split_settings(settings, values)
    options = made_options(room.DistillOptions, {**values, **own}, "distill")
    if only_plan:
        _plan(teacher, offload_teacher, model, data, options, of_data, gpus, gpu, as_json)
        return
    missing = [flag for flag, given in (("-d TEXT", data), ("-o FOLDER", output)) if not given]
    if teacher is None and options.cache is None:
        missing.insert(0, "-t TEACHER (or --cache FOLDER with the predictions of one)")
    if missing or output is None:
        raise RecipeError(f"distill: missing {', '.join(missing)}.")
    _train(teacher, offload_teacher, model, data, output, text, options, of_data, torch_device, as_json)


def _train(teacher: str | None, offload: bool, model: str, data: tuple[str, ...], output: str, text: str | None,
           options: Any, of_data: dict[str, Any], torch_device: str, as_json: bool) -> None:  # fmt: skip
    from dwindle import distill as room
    from dwindle.data import DataOptions, evaluation_set, training_set
    from dwindle.token_set import require_disjoint

    place = model_place(output, model, teacher)
    work = beside(place, "work")
    student = load(model, torch_device)
    of_train = made_options(DataOptions, {"train": data, "seed": options.seed, **of_data}, "data")
    train = training_set(of_train, student.tokenizer, student.anatomy.context)
    evaluation = None if text is None else evaluation_set(text, student.tokenizer)
    if evaluation is not None:
        require_disjoint(train, evaluation)
    needed = options.cache is None or evaluation is not None or room.teacher_is_needed(options.cache, train, teacher)
    guide = None
    if teacher is not None and needed:
        notify(f"loading {teacher}" + (" layer by layer, as it runs" if offload else ""))
        guide = room.Teacher.load(teacher, torch_device=torch_device, offload=offload, alone=options.cache is not None)
    trained, record = room.run(student, options, teacher=guide, train=train, folder=work, evaluation=evaluation)
    if options.cache is not None and guide is not None and teacher is not None:
        room.remember_teacher(options.cache, teacher)
    save(trained, record, output, as_json)
    if evaluation is not None and not as_json:
        last = record.details["history"][-1]
        click.echo("".join(f"  {name.removeprefix('evaluation_'):20} {value:.4f}\n" for name, value in last.items()
                           if name.startswith("evaluation_")), nl=False)  # fmt: skip
    shutil.rmtree(work, ignore_errors=True)


def _plan(teacher: str | None, offload: bool, model: str, data: tuple[str, ...], options: Any, of_data: dict[str, Any],
          gpus: int, gpu: str, as_json: bool) -> None:  # fmt: skip
    """Print the arithmetic of a run; configs are all it reads."""
    from dwindle.data import DataOptions, window_of
    from dwindle.distill.memory_plan import ModelSize, memory_plan
    from dwindle.offloaded_model import weightless_model
    from dwindle.pipeline.model_config import model_config, teacher_config

    if teacher is None:
        raise RecipeError("distill: --plan needs -t TEACHER; its config is enough.")
    student = model_config(model)
    of_guide, of_student = (
        ModelSize.of(weightless_model(one), one) for one in (teacher_config(teacher), student.config)
    )
    reading = made_options(DataOptions, {"train": data or "TEXT", **of_data}, "data")
    context = window_of(reading, student.anatomy.context)
    made = memory_plan(of_student, student.anatomy, of_guide, options, context=context, processes=gpus, gpu=gpu,
                       offloaded=offload)  # fmt: skip
    emit(made.to_json(), made.table(), as_json)

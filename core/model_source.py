"""From a folder or a Hugging Face id to a loaded model and tokenizer, with every refusal explained.

The order is: find the folder, read the config, check the files (`checkpoint_files`), compare the stored tensors' names
and shapes with what the config builds, and only then let transformers load. transformers alone would fill a missing
tensor with random numbers and a warning, and its 4.57 reads a rope written by 5.x as the default one.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dwindle.anatomy import anatomy_of, family_of
from dwindle.checkpoint_files import CheckpointFiles, inspect_checkpoint, read_config
from dwindle.errors import UnsupportedModel, offenders
from dwindle.experts import name_expert_count, stored_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["QUANT_METHOD", "attention_of", "compare_tensors", "find_folder", "load_config", "load_model",
           "quiet_transformers", "separate_rope", "skeleton_of", "warn_remote_code"]  # fmt: skip

QUANT_METHOD = "dwindle"
_log = logging.getLogger("dwindle")
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_UNWANTED = ["consolidated*", "*/*"]
"""Second copies of the weights in other layouts, and everything in subfolders."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HARMLESS_EXTRA = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias)")
_LONGEST_NAME = 1024
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars, notices and deprecation warnings off the user's screen; errors still raise."""
    from transformers.utils import logging as notices

    verbosity, bars = notices.get_verbosity(), notices.is_progress_bar_enabled()
    notices.set_verbosity_error()
    notices.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        notices.set_verbosity(verbosity)
        if bars:
            notices.enable_progress_bar()


def find_folder(path_or_id: str | Path) -> tuple[Path, str | None]:
    """Return the local folder and, for a Hugging Face id, the revision (commit) that was found or fetched."""
    given = str(path_or_id)
    with contextlib.suppress(RuntimeError):  # ~name of an unknown user stays as it is, and does not exist
        given = str(Path(given).expanduser()) if given.startswith("~") else given
    if len(given) > _LONGEST_NAME or "\0" in given:
        raise UnsupportedModel(f"{given!r:.80} cannot be a model's name or folder ({len(given):,} characters).")
    folder = Path(given)
    if folder.is_dir():
        return folder, None
    if folder.exists():
        raise UnsupportedModel(f"{given} is a file. Give the model's folder (config.json, *.safetensors, tokenizer).")
    if isinstance(path_or_id, Path) or _HUB_ID.fullmatch(given) is None:
        raise UnsupportedModel(f"{given} does not exist. Give a model folder or a Hugging Face id such as org/name.")
    return _download(given)


def _download(hub_id: str) -> tuple[Path, str]:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        with quiet_transformers():
            snapshot = Path(
                huggingface_hub.snapshot_download(hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
            )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModel(
            f"{hub_id} is no folder here and could not be had from Hugging Face "
            f"({type(error).__name__}: {first_line}). "
            "Check the spelling, the network and HF_HUB_OFFLINE, and for gated models run: hf auth login."
        ) from error
    return snapshot, snapshot.name


def separate_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config dict whose rope stands under the keys of transformers 4.57 (`rope_theta`, `rope_scaling`, ...).

    5.x writes one `rope_parameters`, which 4.57 does not read; 5.x reads both forms, so the result loads in either.

    >>> separate_rope({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    {'rope_theta': 500000.0, 'rope_scaling': None}
    """
    config = dict(raw)
    given = config.pop("rope_parameters", None)
    if not given:
        return config
    if "full_attention" in given or "sliding_attention" in given:
        local = dict(given.get("sliding_attention") or {})
        if local.get("rope_type", "default") != "default":
            raise UnsupportedModel(
                f"config.json scales the rope of sliding layers ({local}), which transformers 4.57 cannot compute. "
                "Run: pip install 'transformers>=5'"
            )
        if "rope_theta" in local:
            config["rope_local_base_freq"] = local["rope_theta"]
        given = given.get("full_attention") or {}
    scaling = dict(given)
    for key in ("rope_theta", "partial_rotary_factor"):
        if scaling.get(key) is not None:
            config[key] = scaling[key]
        scaling.pop(key, None)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    config["rope_scaling"] = None if kind == "default" else _scaling_of(str(config.get("model_type")), kind, scaling)
    return config


def _scaling_of(model_type: str, kind: str, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Return 4.57's `rope_scaling`; two of its config classes accept nothing but the old spelling."""
    if model_type == "phi3":
        return {"type": kind, "short_factor": scaling.get("short_factor"), "long_factor": scaling.get("long_factor")}
    if model_type == "olmo2":
        return {"type": kind, "factor": float(scaling.get("factor") or 0.0)}
    return {"rope_type": kind, **scaling}


def load_config(folder: Path) -> PretrainedConfig:
    """Return the transformers config of a checkpoint folder, for a family in the table with possible shapes.

    Where a checkpoint brings modelling code of its own (`auto_map`), transformers' class is used all the same.
    """
    import transformers

    raw = read_config(folder)
    if isinstance(raw.get("text_config"), dict):
        raise UnsupportedModel(
            f"{folder} is a multimodal {raw.get('model_type')!r} model. Give its text model alone "
            f"(model_type {raw['text_config'].get('model_type')!r}) as a folder of its own."
        )
    family_of(raw.get("model_type"))
    _require_known_quantization(folder, raw)
    try:
        if int(transformers.__version__.split(".")[0]) < 5:
            raw = separate_rope(raw)
        raw = name_expert_count(raw)
        for key in ("_name_or_path", "auto_map", "dtype", "torch_dtype"):
            raw.pop(key, None)
        with quiet_transformers():
            config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        anatomy_of(config)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{folder / 'config.json'}: {error}") from error
    except Exception as error:  # config classes raise whatever a nonsensical value makes them run into
        path = folder / "config.json"
        why = str(error).rstrip(".")
        raise UnsupportedModel(f"{path}: {why}. Mend it or download the checkpoint again.") from error
    return config


def _require_known_quantization(folder: Path, raw: Mapping[str, Any]) -> None:
    given = raw.get("quantization_config")
    method = given.get("quant_method") if isinstance(given, dict) else given
    if given is not None and method != QUANT_METHOD:
        raise UnsupportedModel(
            f"{folder} is already quantized ({method!r}). Give the unquantized checkpoint; dwindle quantizes it itself."
        )


def load_model(folder: Path, config: PretrainedConfig) -> tuple[PreTrainedModel, CheckpointFiles]:
    """Return (the model in float32 and eval mode, its validated files)."""
    from transformers import AutoModelForCausalLM

    files = inspect_checkpoint(folder)
    with quiet_transformers():
        try:
            compare_tensors(folder, config, files)
            model = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, attn_implementation=attention_of(config),
                use_safetensors=True, local_files_only=True,
            )  # fmt: skip
        except UnsupportedModel:
            raise
        except Exception as error:  # modelling code raises whatever a nonsensical value makes it run into
            raise UnsupportedModel(f"{folder} cannot be loaded ({type(error).__name__}: {error}).") from error
    broken = [name for name, p in model.named_parameters() if p.is_floating_point() and not torch.isfinite(p).all()]
    if broken:
        raise UnsupportedModel(
            f"{folder}: {len(broken)} tensors hold NaN or infinity: {offenders(broken)}. Use an earlier checkpoint."
        )
    return model.eval(), files


def attention_of(config: PretrainedConfig) -> str:
    """Return transformers' name of the attention to load a config with."""
    soft_capped = anatomy_of(config).traits.attention_softcap is not None
    return "eager" if soft_capped else "sdpa"  # PyTorch's fused attention has no soft cap and would leave it out


def skeleton_of(config: PretrainedConfig) -> PreTrainedModel:
    """Return the float32 model that a config builds, without weights: on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention_of(config)
        )
    return model.eval()


def compare_tensors(folder: Path, config: PretrainedConfig, files: CheckpointFiles) -> None:
    """Raise UnsupportedModel unless the stored tensors are exactly those that the config builds."""
    _require_plausible(folder, config, files)
    built = skeleton_of(config)
    packed = getattr(config, "quantization_config", None)
    if packed is not None:
        from dwindle.quantized_model import replace_modules

        with torch.device("meta"):
            replace_modules(built, packed)
    layout = stored_layout(anatomy_of(config), built.state_dict())
    needed = {name: tuple(tensor.shape) for name, tensor in layout.items()}
    found = {name: tensor.shape for name, tensor in files.tensors.items() if not _HARMLESS_EXTRA.fullmatch(name)}
    if config.tie_word_embeddings and _HEAD not in found:
        needed.pop(_HEAD, None)
    problems = [f"{name} is missing" for name in needed.keys() - found.keys()]
    problems += [f"{name} has no place in the model" for name in found.keys() - needed.keys()]
    problems += [
        f"{name} is {list(found[name])} where {list(needed[name])} is needed"
        for name in needed.keys() & found.keys()
        if found[name] != needed[name]
    ]
    if problems:
        raise UnsupportedModel(
            f"{folder}: config.json and the weights disagree in {len(problems)} tensors: "
            f"{offenders(sorted(problems))}. Use the config.json that belongs to these weights."
        )
    if config.tie_word_embeddings and _HEAD in found:
        _require_equal_head(folder, files)


def _require_plausible(folder: Path, config: PretrainedConfig, files: CheckpointFiles) -> None:
    """Raise UnsupportedModel if the config wants far more layers or experts than tensors are stored.

    Building a model takes time for every module, also without memory for its weights; a config of a few bytes can ask
    for a million of them.
    """
    anatomy = anatomy_of(config)
    experts = [found.count for layer in range(min(anatomy.layers, 1000)) if (found := anatomy.experts_of(layer))]
    needed, found_count = anatomy.layers + sum(experts), len(files.tensors)
    if needed > found_count:
        raise UnsupportedModel(
            f"{folder}: config.json and the weights disagree: {anatomy.layers:,} layers with {sum(experts):,} experts "
            f"cannot be made of {found_count:,} tensors. Use the config.json that belongs to these weights."
        )


def _require_equal_head(folder: Path, files: CheckpointFiles) -> None:
    """Raise UnsupportedModel if a tied checkpoint stores a head of its own: 4.57 would drop it, 5.x would use it."""
    from safetensors import safe_open

    stored = []
    for name in (_HEAD, _EMBEDDING):
        with safe_open(folder / files.tensors[name].file, framework="pt") as shard:
            stored.append(shard.get_tensor(name))
    if not torch.equal(*stored):
        raise UnsupportedModel(
            f"{folder}: config.json ties the head to the embedding, but {_HEAD} differs from {_EMBEDDING}. "
            "Set tie_word_embeddings to false in config.json, or remove the stored head."
        )


def warn_remote_code(name: str) -> None:
    """Log, loudly, that code from a checkpoint will run."""
    _log.warning("trust_remote_code is on: Python code that comes with %s will be run on this machine", name)

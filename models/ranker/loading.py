"""Loads a causal language model from a Hugging Face folder, with exactly the weights that its architecture has."""

import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from preprocessing.errors import InputError

disable_progress_bar()
# transformers prints a table of the weights that do not fit, instead of which load_causal_lm raises an error.
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())


def load_causal_lm(folder: Path, remedy: str, **given: Any) -> Any:
    """Return the model that a folder holds, in evaluation mode; Python code in the folder is never run.

    Args:
        folder: a Hugging Face folder with safetensors weights.
        remedy: what to do about a folder that cannot be loaded, the end of the error's sentence.
        given: further arguments of transformers' ``from_pretrained``.

    Raises:
        InputError: the weights cannot be read, or they are not those of the architecture. transformers would initialise
            missing ones at random.
    """
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported below
            output_loading_info=True,
            **given,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder} cannot be loaded ({cause}): {remedy}") from error
    if missing := loaded["missing_keys"]:
        raise InputError(f"{folder} lacks weights such as {min(missing)}: {remedy}")
    if unexpected := loaded["unexpected_keys"]:
        raise InputError(
            f"{folder} holds weights that {type(model).__name__} does not have, such as {min(unexpected)}: {remedy}"
        )
    if mismatched := loaded["mismatched_keys"]:
        name, found, expected = min(mismatched)
        raise InputError(
            f"{folder} holds {name} of shape {list(found)}, but its config.json asks for {list(expected)}: {remedy}"
        )
    return model

"""PEFT's `save_pretrained` for veratune's layers: a killed process leaves the old files or the new ones."""

import shutil
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from veratune.checkpoint.files import CARD_NAME, CONFIG_NAME
from veratune.utils.exchange import replace_together


def saving(save: Callable[..., Any], own_tuner: type) -> Callable[..., Any]:
    """Return PEFT's `save_pretrained` that writes somewhere else and exchanges the files when all are complete.

    Args:
        save: PEFT's own, which writes an adapter's weights over the old ones, and then its configuration.
        own_tuner: the class of the tuners of veratune's layers. Models without such go to PEFT's own.
    """

    @wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        tuners = [PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type) for config in self.peft_config.values()]
        ours = any(isinstance(tuner, type) and issubclass(tuner, own_tuner) for tuner in tuners)
        root = Path(save_directory)
        if not ours or root.is_file() or kwargs.get("is_main_process") is False:
            return save(self, save_directory, *args, **kwargs)
        with tempfile.TemporaryDirectory() as place:
            for card in root.glob(f"**/{CARD_NAME}") if root.is_dir() else ():  # which PEFT updates
                if card.is_file() and (card.parent == root or card.parent.name in self.peft_config):
                    copy = Path(place) / card.relative_to(root)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(card, copy)
            result = save(self, place, *args, **kwargs)
            for folder in sorted({path.parent for path in Path(place).glob("**/*") if path.is_file()}):
                paths = sorted(folder.iterdir(), key=lambda path: (path.name == CONFIG_NAME, path.name))
                files = {path.name: path.read_bytes() for path in paths if path.is_file()}
                replace_together(root / folder.relative_to(place), files)
        return result

    return save_pretrained

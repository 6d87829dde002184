"""Model folders read and written file by file, so that no model is ever whole in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from align.checkpoint import RESULT_MANIFEST, new_result
from align.config import ModelConfig
from align.errors import ModelError
from align.models import load
from align.models.weights import INDEX, weight_files

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class ModelFolder:
    """A folder in Hugging Face layout with weights in safetensors."""

    def __init__(self, folder: Path):
        """Raises `ModelError` for an incomplete or quantized model folder."""
        section = ModelConfig(path=str(folder))
        if not folder.is_dir():
            remedy = "download the model into a folder and give that"
            raise ModelError("is not a folder", where=str(folder), remedy=remedy)
        load.check(section, 0)
        self.folder = folder
        self.files: dict[Path, list[str]] = {}
        """Names of the weights in each file."""
        self._opened: dict[str, Any] = {}
        for file in weight_files(section):
            opened = safe_open(file, framework="pt")
            self.files[file] = list(opened.keys())
            self._opened |= dict.fromkeys(self.files[file], opened)
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))

    @property
    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Number format and shape of each weight."""
        slices = {name: opened.get_slice(name) for name, opened in self._opened.items()}
        return {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}

    def tensor(self, name: str) -> Tensor:
        """A weight, read now."""
        return self._opened[name].get_tensor(name)

    def rewrite(
        self, out: Path, change: Callable[[str, Tensor], Mapping[str, Tensor]], texts: Mapping[str, str]
    ) -> None:
        """Write the folder ``out`` with what ``change`` makes of each weight, in files of the same names.

        Other files are copied, but for weights in other formats; ``texts`` take their place or come beside them. The
        folder is there whole or not at all. Raises `ModelError` where it is there already.
        """
        with new_result(out) as partial:
            weight_map: dict[str, str] = {}
            total = 0
            for file, names in self.files.items():
                tensors: dict[str, Tensor] = {}
                for name in names:
                    tensors |= change(name, self.tensor(name))
                save_file(tensors, partial / file.name, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(tensors, file.name)
                total += sum(tensor.nbytes for tensor in tensors.values())
            for file in sorted(self.folder.iterdir()):
                if file.is_file() and file.suffix not in (".safetensors", *PICKLES) and file.name != RESULT_MANIFEST:
                    shutil.copyfile(file, partial / file.name)
            if (partial / INDEX).exists():
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")

"""A file of weights in the form of another program, as a model of diffusers has them: by diffusers' own conversion.

Its functions take a whole checkpoint and give a whole state dictionary. One is run once on tensors without values,
which tells where each weight comes from: most are places in the file, or pieces of it put together. What else is done
to a weight is done when it is read: the function is run again, with values in those sources that this weight is made
of, and none in the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from odewei.errors import CheckpointError, WeightMismatchError
from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.loaders.gathering import GatheringLoader
from odewei.loaders.tensors import check_plain, is_castable, read_tensor
from odewei.pretrained.naming import Taken
from odewei.pretrained.quantisation import check_scales
from odewei.pretrained.tracing import Watch

__all__ = ["convert_single_file"]


def convert_single_file(
    model: Any, checkpoint: WeightsLoader, settings: Mapping[str, object], dtype: torch.dtype | None
) -> WeightsLoader:
    """The checkpoint's weights as the model without weights has them, floating ones in ``dtype`` (None: the model's).

    Buffers of the model get that dtype too, as in diffusers. Raises CheckpointError where diffusers has no conversion,
    or its conversion does not fit the file.
    """
    from diffusers.loaders import single_file_model

    taken = [Taken(info, name, None) for name, info in checkpoint.weights().items()]
    expected = model.state_dict()
    name = single_file_model._get_single_file_loadable_mapping_class(type(model))
    convert: Callable[..., Any] | None = None
    if single_file_model._should_convert_state_dict_to_diffusers(expected, dict(checkpoint.weights())):
        if name is None:
            raise CheckpointError(
                f"diffusers reads no single files for a {type(model).__name__}, and this one has not its names",
                file=str(checkpoint.place),
                cure="Convert it to a folder, with config.json, by the program that it was made for",
            )
        convert = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
    loader = _SingleFileLoader(checkpoint, taken, convert, settings, expected, dtype)
    used = {place for places in loader.used.values() for place in places}
    left = (one.info for place, one in enumerate(taken) if place not in used)
    check_scales((taken[place].info for place in used), left)
    if dtype is not None:
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[key] = buffer.to(dtype)
    return loader


class _SingleFileLoader(WeightsLoader):
    """``taken`` of ``checkpoint``, converted. ``used`` says by the places in ``taken`` what each weight is made of."""

    def __init__(
        self,
        checkpoint: WeightsLoader,
        taken: Sequence[Taken],
        convert: Callable[..., Any] | None,
        settings: Mapping[str, object],
        expected: Mapping[str, torch.Tensor],
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self._loader = checkpoint
        self._gathering = GatheringLoader(checkpoint, {})
        self._taken = taken
        self._convert = convert
        self._settings = dict(settings)
        self._infos: dict[str, WeightInfo] = {}
        self._computed: set[str] = set()
        self.used: dict[str, list[int]] = {}
        with torch.no_grad(), Watch(taken, follows=True) as watch:
            for name, tensor in self._converted(watch.leaves).items():
                if name not in expected or not isinstance(tensor, torch.Tensor):
                    continue
                self.used[name] = watch.sources(tensor)
                one = watch.described(name, tensor)
                floating = tensor.is_floating_point()
                wanted = expected[name].dtype if dtype is None else dtype if floating else tensor.dtype
                is_computed = one.is_computed or not (wanted == one.info.dtype or _may_be_cast(one.info.dtype, wanted))
                if is_computed:
                    self._computed.add(name)
                    self._infos[name] = WeightInfo(name, wanted, tuple(tensor.shape), None)
                else:
                    self._infos[name] = one.info if wanted == one.info.dtype else replace(one.info, wanted=wanted)

    @property
    def place(self) -> Path | None:
        return self._loader.place

    @property
    def computed(self) -> tuple[str, ...]:
        """The names of the weights that are computed, not only read."""
        return tuple(sorted(self._computed))

    def weights(self) -> Mapping[str, WeightInfo]:
        return self._infos

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        if info.name not in self._computed or self._infos[info.name] is not info:
            self._gathering.read_into(info, buffer)
            return
        leaves = [torch.empty(one.info.shape, dtype=one.info.dtype, device="meta") for one in self._taken]
        with torch.inference_mode(False), torch.no_grad():
            for place in self.used[info.name]:
                leaves[place] = read_tensor(self._loader, self._taken[place].info)
            made = check_plain(self._converted(leaves)[info.name], weight=info.name).to(info.dtype)
            if tuple(made.shape) != info.shape or buffer.nbytes != info.nbytes:
                raise WeightMismatchError(
                    f"the conversion gave {tuple(made.shape)}, not {info.shape}",
                    weight=info.name,
                    file=str(self.place),
                    cure="This is a mistake in the conversion: report it",
                )
            if buffer.nbytes:
                target = torch.frombuffer(buffer, dtype=torch.uint8)
                target.copy_(made.contiguous().view(-1).view(torch.uint8))

    def close(self) -> None:
        self._loader.close()

    def _converted(self, leaves: Sequence[torch.Tensor]) -> Mapping[str, Any]:
        checkpoint: dict[str, Any] = {one.info.name: leaf for one, leaf in zip(self._taken, leaves, strict=True)}
        if self._convert is None:
            return checkpoint
        try:
            made: Mapping[str, Any] = self._convert(config=dict(self._settings), checkpoint=checkpoint)
        except Exception as error:
            raise CheckpointError(
                f"diffusers cannot convert the file: {type(error).__name__}: {str(error)[:300]}",
                file=str(self.place),
                cure="Give the model_class and config= that belong to the file, or convert it to a folder",
            ) from error
        return made

    def __repr__(self) -> str:
        return f"<{len(self._infos)} weights of a single file, {len(self._computed)} computed, over {self._loader!r}>"


def _may_be_cast(stored: torch.dtype, wanted: torch.dtype) -> bool:
    return is_castable(stored) and is_castable(wanted)

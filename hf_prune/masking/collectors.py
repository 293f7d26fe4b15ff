"""Collecting what methods, scopes and reconstructions read besides the weights: the inputs of linear layers, the loss's
gradients at their outputs, what whole layers get and return, and gradients of weights, of one optimizer step.

They are summed over the micro-batches of the step and over processes, so that they depend on the global batch and not
on how it was split.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..engines.holdings import is_shared
from ..engines.processes import all_reduce
from ..errors import PruningStateError, TargetError
from ..methods.reconstructions import InputMoments
from ..model.anatomy import expert_modules
from ..model.layouts import inputs_of, outputs_of
from ..model.names import named_modules_of, plain_model
from ..structure.skipping import hidden_states

# The number of tokens whose inputs are converted to float64 at once.
_ROWS = 4096

# For how many collected steps in a row a layer may be skipped: LayerDrop with 0.2 reaches that once in millions.
_PATIENCE = 10


@dataclass(frozen=True)
class Collected:
    """What was read in one optimizer step, by parameter name, or by the path of a whole layer.

    `inputs` has the norm of each input feature over all processes, and `tokens` how many inputs that is of; `moments`
    has the moments of all input features, `outputs` the sum over tokens of the square of the loss's gradient at each
    output (float64), `gradients` the gradient of each weight that this process holds, flat, and `similarity` the mean
    cosine between what a layer gets and what it returns for a token. For what is in `unusable`, nothing or a value that
    is not finite was collected; `unreached` are those of it that are experts which no token reached.
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    moments: dict[str, InputMoments] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    similarity: dict[str, float] = field(default_factory=dict)
    unusable: set[str] = field(default_factory=set)
    unreached: set[str] = field(default_factory=set)


class Statistics:
    """Collects, from `begin` to `finish`, what is read for the given parameters and layers.

    Args:
        model: the model that is trained.
        readers: parameter name -> what reads the inputs of its layer, for error messages: `method`, `scope` or
            `reconstruction`.
        similarity: paths of layers whose outputs are compared with what they get.

    Attributes:
        gradient_names: the parameters whose gradients are kept in this step.

    Raises: TargetError, naming the parameter, if it is not the weight of a linear layer, whose inputs can be collected.
    """

    def __init__(self, model: nn.Module, readers: Mapping[str, str], similarity: Iterable[str] = ()):
        self._model = model
        self._all_modules = named_modules_of(model, readers.keys())
        self._widths: dict[str, int] = {}  # the number of input features
        for name, module in self._all_modules.items():
            width = inputs_of(module)
            if width is None:
                raise TargetError(
                    f"{name}: expected the weight of a linear layer for a {readers[name]} that reads inputs, got one "
                    f"of {type(module).__name__}; exclude it or choose another {readers[name]}"
                )
            self._widths[name] = width
        experts = expert_modules(model) if self._all_modules else set()
        self._experts = {name for name, module in self._all_modules.items() if id(module) in experts}
        self._all_around = _modules_around(model, self._all_modules)
        self._idle: dict[str, int] = {}  # for how many collected steps in a row a layer was not called
        plain = plain_model(model)
        self._all_layers = {path: plain.get_submodule(path) for path in similarity}
        self.gradient_names: set[str] = set()
        self._modules: dict[str, nn.Module] = {}  # those that are read in this step, as all that follows
        self._layers: dict[str, nn.Module] = {}
        self._squared: set[str] = set()
        self._multiplied: set[str] = set()
        self._followed: set[str] = set()
        self._called: set[str] = set()  # the parameters whose layers were called, and the layers
        self._called_around: set[str] = set()
        self._returned: set[str] = set()  # the parameters at whose layers' outputs a gradient came
        self._output_squares: dict[str, torch.Tensor] = {}
        self._squares: dict[str, torch.Tensor] = {}
        self._products: dict[str, torch.Tensor] = {}  # of inputs minus the centre
        self._centres: dict[str, torch.Tensor] = {}  # near the mean of the inputs, so that float32 is enough
        self._sums: dict[str, torch.Tensor] = {}  # of inputs; of whole layers, of cosines
        self._tokens: dict[str, int] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []
        self._in_forward = False
        self._attention: torch.Tensor | None = None

    @property
    def is_collecting(self) -> bool:
        """Whether collection is under way."""
        return bool(self._hooks)

    def begin(
        self,
        inputs: Collection[str] = (),
        gradients: Collection[str] = (),
        products: Collection[str] = (),
        similarity: Collection[str] = (),
        outputs: Collection[str] = (),
    ) -> None:
        """Start to collect, for the next optimizer step.

        Args:
            inputs: names of parameters for which the squares of their layers' inputs are summed, by input feature.
            gradients: names of parameters whose gradients are kept.
            products: names of parameters for which the products of all input features are summed.
            similarity: paths of layers whose outputs are compared with what they get.
            outputs: names of parameters for which the squares of their layers' inputs are summed, and those of the
                loss's gradients at their outputs.
        """
        self.stop()
        self._squares, self._products, self._centres, self._gradients = {}, {}, {}, {}
        self._sums, self._tokens, self._output_squares = {}, {}, {}
        self._called, self._called_around, self._returned = set(), set(), set()
        self._squared, self._multiplied = {*inputs, *outputs}, set(products)
        self._followed, self.gradient_names = set(outputs), set(gradients)
        read = self._squared | self._multiplied
        self._modules = {name: module for name, module in self._all_modules.items() if name in read}
        self._layers = {path: layer for path, layer in self._all_layers.items() if path in similarity}
        around = {name: module for name, module in self._all_around.items() if name in read}
        self._hooks = [
            self._model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._model.register_forward_hook(self._leave, always_call=True),
            *(module.register_forward_pre_hook(self._see(name)) for name, module in self._modules.items()),
            *(module.register_forward_pre_hook(self._see_around(name)) for name, module in around.items()),
            *(
                module.register_forward_hook(self._follow(name))
                for name, module in self._modules.items()
                if name in self._followed
            ),
            *(
                layer.register_forward_hook(self._compare(path), with_kwargs=True)
                for path, layer in self._layers.items()
            ),
        ]

    def stop(self) -> None:
        """Stop collecting."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def keep_gradient(self, name: str, gradient: torch.Tensor) -> None:
        """Keep the gradient of the whole batch, or this process's shard of it, if it is being collected."""
        if self.is_collecting and name in self.gradient_names:
            self._gradients[name] = gradient.detach().float().reshape(-1).clone()

    def finish(self) -> Collected:
        """Stop, and return what was collected; every process must call it.

        Raises PruningStateError if nothing was collected for any parameter, or if a layer that is no expert was not
        called.
        """
        self.stop()
        gradient_names = sorted(self.gradient_names)
        names = [*self._modules, *self._layers, *gradient_names]
        seen = [int(name in self._called) for name in (*self._modules, *self._layers)]
        seen += [int(name in self._gradients) for name in gradient_names]
        bad = [0] * (len(self._modules) + len(self._layers))
        bad += [int(name in self._gradients and not self._gradients[name].isfinite().all()) for name in gradient_names]
        around = [int(name in self._called_around) for name in names]
        returned = [int(name in self._returned or name not in self._followed) for name in names]
        counts = all_reduce(torch.tensor([seen, bad, around, returned], dtype=torch.int64)).tolist()
        if names and not any(counts[0]):
            what = "gradient" if names[0] in self.gradient_names else "inputs"
            raise PruningStateError(
                f"{names[0]}: expected its {what} in the optimizer step before a mask update, saw none for any "
                "parameter; the parameters are frozen, the model is compiled, or there was no step: use a method that "
                "reads only the weights, such as 'magnitude'"
            )
        self._check_called(counts[0], counts[2], counts[3])
        unseen = {name for name, is_seen in zip(names, counts[0], strict=True) if not is_seen}
        unusable = unseen.union(
            name for name, is_bad, back in zip(names, counts[1], counts[3], strict=True) if is_bad or not back
        )
        (norms, tokens), outputs = self._norms(), self._outputs()
        moments, similarity = self._moments(), self._similarity()
        unusable |= {name for name, norm in norms.items() if not norm.isfinite().all()}
        unusable |= {name for name, one in moments.items() if not one.products.isfinite().all()}
        unusable |= {path for path, cosine in similarity.items() if not math.isfinite(cosine)}
        unusable |= {name for name, one in outputs.items() if not one.isfinite().all()}
        return Collected(
            norms, tokens, outputs, moments, self._gradients, similarity, unusable, unreached=unseen & self._experts
        )

    def _check_called(self, seen: Sequence[int], around: Sequence[int], returned: Sequence[int]) -> None:
        """Raise PruningStateError for a layer that is never called, from what was seen on all processes in a step.

        A layer that is not called although the module around it is, is none that this step skipped (LayerDrop, experts
        without tokens). One that is skipped again and again is none either, unless it is an expert. Nor is one at whose
        outputs no gradient comes, again and again.
        """
        for name, is_seen, is_around, is_back in zip(self._modules, seen, around, returned, strict=False):
            self._idle[name] = 0 if is_seen and is_back else self._idle.get(name, 0) + 1
            if is_seen and self._idle[name] > _PATIENCE:
                raise PruningStateError(
                    f"{name}: expected a gradient of the loss at the outputs of its layer in the optimizer step before "
                    "a mask update, saw none: the loss does not depend on them; exclude it, or use the scope 'layer'"
                )
            is_idle = self._idle[name] > _PATIENCE and name not in self._experts
            if not is_seen and (is_around or is_idle):
                raise PruningStateError(
                    f"{name}: expected a call of its layer in the optimizer step before a mask update, saw none: its "
                    "module uses the weight without calling the layer, as nn.MultiheadAttention does, or not at all; "
                    "exclude it, or use a method that reads only the weights, such as 'magnitude'"
                )

    def _norms(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """The norm of each input feature over all processes, and the number of inputs, with one all-reduce."""
        widths = {name: width for name, width in self._widths.items() if name in self._squared}
        if not widths:
            return {}, {}
        tokens = torch.tensor([self._tokens.get(name, 0) for name in widths], dtype=torch.float64)
        summed = all_reduce(torch.cat([*_whole(self._squares, widths), tokens]))
        squares, tokens = summed[: -len(widths)], summed[-len(widths) :]
        norms = squares.sqrt().float().split(list(widths.values()))
        return dict(zip(widths, norms, strict=True)), dict(zip(widths, map(int, tokens.tolist()), strict=True))

    def _outputs(self) -> dict[str, torch.Tensor]:
        """The sums of the squares of gradients at outputs over all processes, with one all-reduce."""
        widths = {name: _outputs_of(module) for name, module in self._modules.items() if name in self._followed}
        if not widths:
            return {}
        sums = all_reduce(torch.cat(_whole(self._output_squares, widths))).split(list(widths.values()))
        return dict(zip(widths, sums, strict=True))

    def _moments(self) -> dict[str, InputMoments]:
        """The moments of inputs over all processes, for one layer after another."""
        found = {}
        for name in sorted(self._multiplied):
            width, device = self._widths[name], next(self._modules[name].parameters()).device
            zero = torch.zeros(width, dtype=torch.float64, device=device)
            sums, centre, tokens = self._sums.get(name, zero), self._centres.get(name, zero), self._tokens.get(name, 0)
            all_tokens = int(all_reduce(torch.tensor([tokens], dtype=torch.int64)))
            means = all_reduce(sums) / max(all_tokens, 1)
            products = self._products.pop(name, torch.zeros(width, width, device=device)).double()
            moved = torch.outer(sums - tokens * centre, means - centre)  # from the centre to the means
            products += tokens * torch.outer(means - centre, means - centre) - moved - moved.T
            found[name] = InputMoments(all_tokens, means, all_reduce(products).float())
        return found

    def _similarity(self) -> dict[str, float]:
        """The mean cosine of each layer over the tokens of all processes; NaN without tokens."""
        if not self._layers:
            return {}
        sums = [[float(self._sums.get(path, 0.0)), float(self._tokens.get(path, 0))] for path in self._layers]
        cosines, tokens = all_reduce(torch.tensor(sums, dtype=torch.float64)).T
        return dict(zip(self._layers, (cosines / tokens).tolist(), strict=True))

    def _enter(self, model: nn.Module, arguments: Any, options: Mapping[str, Any]) -> None:
        self._in_forward = model.training
        mask = options.get("attention_mask")
        is_decoders = getattr(
            getattr(model, "config", None), "is_encoder_decoder", False
        )  # its decoder has other tokens
        self._attention = mask if torch.is_tensor(mask) and mask.dim() == 2 and not is_decoders else None

    def _leave(self, *arguments: Any) -> None:
        self._in_forward = False  # activation checkpointing runs layers again in backward

    def _see_around(self, name: str) -> Callable[[nn.Module, Any], None]:
        def note(module: nn.Module, arguments: Any) -> None:
            if self._in_forward:
                self._called_around.add(name)

        return note

    def _see(self, name: str) -> Callable[[nn.Module, Any], None]:
        @torch.no_grad()
        def add_inputs(module: nn.Module, arguments: Any) -> None:
            if not self._in_forward:
                return
            seen = arguments[0].detach()
            if is_shared(seen) or seen.shape[-1] != self._widths[name]:
                raise PruningStateError(
                    f"{name}: expected all of its {self._widths[name]} input features on each process, got a "
                    "shard of them (tensor parallelism); use a method that reads only the weights, such as 'magnitude'"
                )
            self._called.add(name)
            tokens = self._without_padding(seen)
            self._tokens[name] = self._tokens.get(name, 0) + len(tokens)
            if name in self._squared:
                _add(self._squares, name, _column_sums(tokens, torch.square))
            if name in self._multiplied:
                sums = _column_sums(tokens, lambda rows: rows)
                centre = self._centres.setdefault(name, (sums / max(len(tokens), 1)).float())
                about = tokens.float() - centre
                with torch.autocast(about.device.type, enabled=False):  # which multiplies in bfloat16
                    _add(self._products, name, about.T @ about)
                _add(self._sums, name, sums)

        return add_inputs

    def _follow(self, name: str) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
        """Sum the squares of the gradients at a layer's outputs.

        With activation checkpointing a layer may run twice; a gradient comes to the outputs of one of the two.
        """

        @torch.no_grad()
        def add_squares(gradient: torch.Tensor) -> None:
            if not self.is_collecting:
                return
            width = _outputs_of(self._modules[name])
            if is_shared(gradient) or gradient.shape[-1] != width:
                raise PruningStateError(
                    f"{name}: expected the gradients at all of its {width} outputs on each process, got a shard of "
                    "them (tensor parallelism); use a scope that reads only the weights, such as 'layer'"
                )
            self._returned.add(name)
            _add(self._output_squares, name, _column_sums(gradient.reshape(-1, width), torch.square))

        def follow(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled() and self._model.training:
                output = with_gradient(output)
                output.register_hook(add_squares)
            return output

        return follow

    def _compare(self, path: str) -> Callable[[nn.Module, Any, Mapping[str, Any], Any], None]:
        @torch.no_grad()
        def add_cosines(layer: nn.Module, arguments: Any, options: Mapping[str, Any], output: Any) -> None:
            if not self._in_forward:
                return
            before, after = hidden_states(arguments, options, output)
            if before.shape != after.shape:
                raise PruningStateError(
                    f"{path}: expected a layer that returns as much as it gets, got {tuple(before.shape)} and returned "
                    f"{tuple(after.shape)}; use another method than 'block_influence'"
                )
            self._called.add(path)
            before, after = (self._without_padding(states.detach()).float() for states in (before, after))
            with torch.autocast(before.device.type, enabled=False):
                _add(self._sums, path, nn.functional.cosine_similarity(before, after).double().sum())
            self._tokens[path] = self._tokens.get(path, 0) + len(before)

        return add_cosines

    def _without_padding(self, states: torch.Tensor) -> torch.Tensor:
        """One row for each token, without those of padding."""
        if self._attention is not None and states.dim() == 3 and states.shape[:2] == self._attention.shape:
            states = states[self._attention.bool()]
        return states.reshape(-1, states.shape[-1])


def with_gradient(output: torch.Tensor) -> torch.Tensor:
    """The same values, of which a gradient will be known: before the first layer, nothing needs one."""
    return output if output.requires_grad else output.detach().requires_grad_().clone()


def _outputs_of(module: nn.Module) -> int:
    """The number of output features of a linear layer."""
    width = outputs_of(module)
    assert width is not None
    return width


def _whole(sums: Mapping[str, torch.Tensor], widths: Mapping[str, int]) -> list[torch.Tensor]:
    """Sums of each name on the CPU, zeros where there are none (float64)."""
    return [
        sums[name].cpu() if name in sums else torch.zeros(width, dtype=torch.float64) for name, width in widths.items()
    ]


def _column_sums(tokens: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The sum of a function of each value, by column (float64)."""
    total = torch.zeros(tokens.shape[-1], dtype=torch.float64, device=tokens.device)
    for rows in tokens.split(_ROWS):
        total += function(rows.double()).sum(0)
    return total


def _add(sums: dict[str, torch.Tensor], name: str, values: torch.Tensor) -> None:
    sums[name] = sums[name] + values if name in sums else values


def _modules_around(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The module that each of these layers is a child of, by the names of their parameters."""
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    return {name: parents[id(layer)] for name, layer in layers.items() if id(layer) in parents}

"""A network as JAX traces it: its outputs in float32 throughout, and where parameters meet data."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

_INLINED = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
            "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}  # fmt: skip
_LEFT_OUT = {"stop_gradient", "reduce_precision"}
ENTRY_BY_ENTRY = {"mul", "add", "sub", "div", "add_any", "max", "min", "pow", "select_n"}
# From the number of an equation, the equation and its operands to its results.
Rule = Callable[[int, JaxprEqn, list[Any]], Sequence[Any]]


def walk(
    jaxpr: Any, constants: Iterable[Any], arguments: Iterable[Any], literal: Any, rule: Rule
) -> list[Any]:
    """What code gives if `rule` says what each equation gives, and `literal` what a number is."""
    known = dict(zip(jaxpr.constvars, constants, strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Any:
        return literal(variable.val) if isinstance(variable, Literal) else known[variable]

    for number, equation in enumerate(jaxpr.eqns):
        results = rule(number, equation, [read(variable) for variable in equation.invars])
        known |= dict(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


# --- Values: the outputs --------------------------------------------------------------------------


def in_float32(number: int, equation: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
    """The results of an equation, calls inlined, in at least float32."""
    name, params = equation.primitive.name, equation.params
    if name in _INLINED:
        inner = params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"]
        closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
        return evaluate(closed, operands)
    if name in _LEFT_OUT:
        return operands
    if name != "bitcast_convert_type":  # which counts bits
        params = {key: _wide_parameter(value) for key, value in params.items()}
    results = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(params))
    return [_wide(x) for x in (results if equation.primitive.multiple_results else [results])]


def evaluate(
    closed: ClosedJaxpr,
    arguments: Iterable[Any],
    rule: Rule = in_float32,
    constants: Iterable[Any] | None = None,
) -> list[Any]:
    """The outputs of traced code, its calls inlined, in at least float32 throughout.

    Rules of differentiation that the code brings along, and its stops, are left out: what counts is
    what the outputs do. `constants` stand in place of those of the code.
    """
    constants = map(_wide, closed.consts if constants is None else constants)
    return walk(closed.jaxpr, constants, arguments, _wide, rule)


def _wide_parameter(value: Any) -> Any:
    """A parameter of an equation, such as a type, the code of a loop or that of its branches."""
    if type(value) is tuple:
        return tuple(map(_wide_parameter, value))
    if isinstance(value, ClosedJaxpr):
        shapes = [
            jax.ShapeDtypeStruct(v.aval.shape, _wide_parameter(v.aval.dtype))
            for v in value.jaxpr.invars
        ]
        return jax.make_jaxpr(lambda *arguments: evaluate(value, arguments))(*shapes)
    return jnp.dtype("float32") if _is_narrow(value) else value


def _is_narrow(dtype: Any) -> bool:
    if not isinstance(dtype, np.dtype | type):
        return False
    try:
        return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    except TypeError:
        return False


def _wide(x: Any) -> Any:
    return x.astype(jnp.float32) if _is_narrow(getattr(x, "dtype", None)) else x


# --- Origins: parameters and data -----------------------------------------------------------------


class Origin(NamedTuple):
    """What a variable is made of."""

    leaves: frozenset[int] = frozenset()  # the parameters, where it is made of them alone
    data: bool = False
    both: bool = False  # of parameters and data


class Contact(NamedTuple):
    """Where parameters meet data."""

    equation: int
    operand: int  # −1: inside a scan
    leaves: frozenset[int]
    primitive: str


def find_contacts(jaxpr: Any, arguments: Sequence[Origin], sizes: dict[int, int]) -> list[Contact]:
    """All equations in which what is made of parameters alone meets what is made of data.

    `sizes` are those of the parameters. Constants that are no scalars are data.
    """
    contacts: list[Contact] = []

    def meet(number: int, equation: Any, operands: list[Origin]) -> list[Origin]:
        name, outputs = equation.primitive.name, len(equation.outvars)
        met = [i for i, operand in enumerate(operands) if operand.leaves]
        union = frozenset[int]().union(*(operands[i].leaves for i in met))
        both = any(operand.both for operand in operands)
        # A mask of the parameters, or a constant scale, makes no data of them.
        masked = (
            name in ENTRY_BY_ENTRY
            and not both
            and met
            and equation.outvars[0].aval.size
            == max(sizes[leaf] for leaf in union)
            == max(equation.invars[i].aval.size for i in met)
        )
        if masked or not any(operand.data for operand in operands):
            return [Origin(union)] * outputs
        if name == "scan" and met:
            inside = _find_inside(equation, operands, sizes)
            contacts.extend(contact._replace(operand=-1) for contact in inside)
        else:
            contacts.extend(Contact(number, i, operands[i].leaves, name) for i in met)
        return [Origin(data=True, both=bool(met) or both)] * outputs

    constants = [Origin(data=bool(v.aval.shape)) for v in jaxpr.constvars]
    walk(jaxpr, constants, arguments, lambda value: Origin(), meet)
    return contacts


def _find_inside(
    scan: JaxprEqn, operands: Sequence[Origin], sizes: dict[int, int]
) -> list[Contact]:
    """The contacts in a step of a scan, whose carries are data."""
    step = scan.params["jaxpr"].jaxpr

    def count_whole(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        """Shapes tell carries, as versions of JAX name their number differently: slices have fewer
        dimensions."""
        return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))

    carried = count_whole(scan.invars, step.invars)
    carries = range(carried - count_whole(scan.outvars, step.outvars), carried)
    given = [Origin(o.leaves, o.data or i in carries) for i, o in enumerate(operands)]
    return find_contacts(step, given, sizes)

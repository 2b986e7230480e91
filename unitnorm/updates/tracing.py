"""A network as JAX traces it: its outputs in float32 throughout, and where parameters meet data."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

_INLINED = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
            "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}  # fmt: skip
ENTRY_BY_ENTRY = {"mul", "add", "sub", "div", "add_any", "max", "min", "pow", "select_n"}
Tap = Callable[[int, int, jax.Array], jax.Array]


def evaluate(
    closed: ClosedJaxpr,
    arguments: Sequence[Any],
    tap: Tap | None = None,
    constants: Sequence[Any] | None = None,
) -> list[Any]:
    """The outputs of traced code, its calls inlined, in at least float32 throughout.

    Rules of differentiation that the code brings along, and its stops, are left out: what counts is
    what the outputs do. `tap` goes from the number of an equation, that of an operand and the
    operand, to the operand; `constants` stand in place of those of the code.
    """
    constants = closed.consts if constants is None else constants
    environment = dict(zip(closed.jaxpr.constvars, map(_wide, constants), strict=True))
    environment |= dict(zip(closed.jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Any:
        if isinstance(variable, Literal):
            return _wide(variable.val)
        return environment[variable]

    for number, equation in enumerate(closed.jaxpr.eqns):
        operands = [read(variable) for variable in equation.invars]
        if tap is not None:
            operands = [tap(number, i, operand) for i, operand in enumerate(operands)]
        outputs = _results(equation, operands)
        environment |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in closed.jaxpr.outvars]


def _results(equation: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name in _INLINED:
        inner = params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"]
        return evaluate(_closed(inner), operands)
    if name == "scan":
        step, consts, carried = _parts_of_scan(equation)

        def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
            after = evaluate(step, [*operands[:consts], *carry, *xs])
            return after[: carried - consts], after[carried - consts :]

        carry, ys = jax.lax.scan(
            body, operands[consts:carried], operands[carried:], params["length"], params["reverse"]
        )
        return [*carry, *ys]
    if name == "while":
        test, rest = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        return jax.lax.while_loop(
            lambda at: evaluate(_closed(params["cond_jaxpr"]), [*operands[:test], *at])[0],
            lambda at: evaluate(_closed(params["body_jaxpr"]), [*operands[test:rest], *at]),
            operands[rest:],
        )
    if name == "cond":
        branches = [
            functools.partial(lambda branch, *at: evaluate(_closed(branch), at), branch)
            for branch in params["branches"]
        ]
        return jax.lax.switch(operands[0], branches, *operands[1:])
    if name in ("stop_gradient", "reduce_precision"):
        return operands
    if name != "bitcast_convert_type":  # which counts bits
        params = {
            key: jnp.dtype("float32") if _is_narrow(value) else value
            for key, value in params.items()
        }
    outputs = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(params))
    return [_wide(out) for out in (outputs if equation.primitive.multiple_results else [outputs])]


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _parts_of_scan(equation: JaxprEqn) -> tuple[ClosedJaxpr, int, int]:
    """The code of a step, and where constants and carries end among its arguments.

    Shapes tell, as versions of JAX give the counts different names: a slice has fewer dimensions.
    """
    step = _closed(equation.params["jaxpr"])

    def count_whole(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))

    carried = count_whole(equation.invars, step.jaxpr.invars)
    return step, carried - count_whole(equation.outvars, step.jaxpr.outvars), carried


def _is_narrow(dtype: Any) -> bool:
    if not isinstance(dtype, np.dtype | type):
        return False
    try:
        return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    except TypeError:
        return False


def _wide(x: Any) -> Any:
    return x.astype(jnp.float32) if _is_narrow(getattr(x, "dtype", None)) else x


class Contact(NamedTuple):
    """Where parameters meet data."""

    equation: int
    operand: int
    leaves: frozenset[int]
    primitive: str


def find_contacts(
    jaxpr: Any,
    leaves: dict[Any, frozenset[int]],
    sizes: dict[int, int],
    data: set[Any] | None = None,
) -> list[Contact]:
    """All equations in which what is made of parameters alone meets what is made of data.

    `leaves` says of variables made of parameters, of which; `sizes` are those of the parameters;
    `data` are variables made of data, by default constants that are no scalars.
    """
    leaves = dict(leaves)
    data = {v for v in jaxpr.constvars if v.aval.shape} if data is None else set(data)
    both = set[Any]()  # made of parameters and data
    contacts = []
    for number, equation in enumerate(jaxpr.eqns):
        operands = [v for v in equation.invars if not isinstance(v, Literal)]
        met = [i for i, v in enumerate(equation.invars) if v in operands and leaves.get(v)]
        union = frozenset[int]().union(*(leaves[equation.invars[i]] for i in met))
        entries = max((equation.invars[i].aval.size for i in met), default=0)
        # A mask of the parameters, or a constant scale, makes no data of them.
        masked = (
            equation.primitive.name in ENTRY_BY_ENTRY
            and not both.intersection(operands)
            and met
            and equation.outvars[0].aval.size == max(sizes[leaf] for leaf in union) == entries
        )
        if masked or not data.intersection(operands):
            leaves |= {v: union for v in equation.outvars if union}
            continue
        data.update(equation.outvars)
        if met or both.intersection(operands):
            both.update(equation.outvars)
        if equation.primitive.name == "scan" and met:
            step, consts, carried = _parts_of_scan(equation)
            body = step.jaxpr
            inside = dict(zip(body.invars, equation.invars, strict=True))
            within = find_contacts(
                body,
                {v: leaves[o] for v, o in inside.items() if o in operands and leaves.get(o)},
                sizes,
                {v for v, o in inside.items() if o in operands and o in data}
                | set(body.invars[consts:carried]),
            )
            for leaf in union:
                kinds = {c.primitive for c in within if leaf in c.leaves}
                kind = next((k for k in kinds if k not in ENTRY_BY_ENTRY), "add")
                contacts.append(Contact(number, -1, frozenset({leaf}), kind))
            continue
        contacts += [
            Contact(number, i, leaves[equation.invars[i]], equation.primitive.name) for i in met
        ]
    return contacts

"""jinja2's immutable sandbox with a budget: loops, calls, filters and operators are counted, and growth is bounded.

The sandbox keeps a template from Python's internals, but not from running forever or from doubling a text forty times.
Here a template's syntax tree is changed before it is compiled, so that loops, and what is kept, pass by the budget;
calls, and what of filters, tests and operators takes long or makes much, are wrapped.

What a template does once per line of its source needs no counting, however often its loops and calls are counted. Nor
does a text grow by more than a few times within one expression: it is measured where it is output or kept under a name,
and a sum of many names part by part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import wraps
from string import Formatter
from typing import Any

from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from llmctl.text.template_budget import MAX_WIDTH, Budget, TemplateLimitError, check_width, thread

# Of HTML, slow on text that means harm, and of no use in a prompt.
_LEFT_OUT = ("urlize", "striptags", "xmlattr", "wordwrap", "pprint")
# What takes no time to speak of, whatever it is given, and makes nothing.
_FREE_FILTERS = frozenset({"length", "count", "first", "last", "default", "d", "attr"})
_FREE_TESTS = frozenset(
    "defined undefined none string mapping sequence iterable number integer float boolean true false callable sameas "
    "odd even divisibleby filter test".split()
)
# What looks at a value, or at each of its items, and not into their depths.
_SHALLOW = frozenset(
    {"list", "map", "select", "reject", "selectattr", "rejectattr", "items", "batch", "slice", "reverse"}
)
# What makes of a text one that is about as long.
_LINEAR = frozenset({"trim", "upper", "lower", "title", "capitalize", "string"})
# Names in a sum beyond which its parts are measured before they are added.
_MOST_NAMES = 8
_WIDE = frozenset({"center", "indent", "batch", "slice", "round", "truncate"})
_PADDING = frozenset({"center", "ljust", "rjust", "zfill"})
_NO_METHODS = frozenset({"to_bytes", "from_bytes", "translate", "maketrans", "expandtabs"})
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*?(\*|\d{4})")
_MAX_BITS = 4096


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates spend the thread's budget."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, finalize=_output, **kwargs)
        del self.globals["lipsum"]
        for name in _LEFT_OUT:
            del self.filters[name]
        self._chars = 0  # of plain text in the template

    def seal(self) -> None:
        """Have all filters and tests spend; called when all are there."""
        tables: tuple[tuple[dict[str, Any], frozenset[str]], ...]
        tables = ((self.filters, _FREE_FILTERS), (self.tests, _FREE_TESTS))
        for table, free in tables:
            for name, function in table.items():
                if name not in free:
                    table[name] = _charged(name, function)
        self.filters.update(
            _add=_add, _concat=_concat, _counted=_counted, _items=_items, _kept=_kept, _sized=_sized, _weighed=_weighed
        )

    def _parse(self, *args: Any) -> nodes.Template:
        tree = super()._parse(*args)
        self._chars = _chars(tree)
        changed: nodes.Template = _Instrument().visit(tree)
        return changed.set_environment(self)  # type: ignore[return-value]

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and not (
            attr in _NO_METHODS and isinstance(obj, str | bytes | int)
        )

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operands(thread.budget, operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        found = super().wrap_str_format(value)
        return None if found is None else _checked_format(value.__self__, found)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = thread.budget
        budget.spend(1)
        for arg in args:
            (budget.weigh if type(arg) is tuple else budget.size)(arg)
        for arg in kwargs.values():
            (budget.weigh if type(arg) is tuple else budget.size)(arg)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes):
            args = _check_method(budget, owner, __obj.__name__, args)
        elif isinstance(__obj, LoopContext):
            args = (_counted(args[0], __self._chars), *args[1:]) if args else args
        result = super().call(__context, __obj, *args, **kwargs)
        budget.size(result)
        return result


class _Instrument(NodeTransformer):
    """Loops count, and what may grow or be looked into is measured, by filters of ours."""

    def __init__(self) -> None:
        self._many = False

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        chars = sum(_chars(child) for child in node.body)
        node.iter = _filter(node.iter, "_counted", nodes.Const(chars))
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        node.node = _keep(node.node)
        return node

    def visit_With(self, node: nodes.With) -> nodes.Node:
        self.generic_visit(node)
        node.values = [_keep(value) for value in node.values]
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.defaults = [_keep(value) for value in node.defaults]
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.defaults = [_keep(value) for value in node.defaults]
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        """Within a sum of many names, every sum is measured."""
        if not self._many and sum(1 for _ in node.find_all(nodes.Name)) <= _MOST_NAMES:
            return self.generic_visit(node)
        before, self._many = self._many, True
        made = self._added(node)
        self._many = before
        return made

    def _added(self, node: nodes.Add) -> nodes.Node:
        terms: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            terms.append(self.visit(left.right))
            left = left.left
        terms.append(self.visit(left))
        return _filter(terms.pop(), "_add", *reversed(terms))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node.nodes[0], "_concat", *node.nodes[1:])

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "_sized") if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._literal(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._literal(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._literal(node)

    def _literal(self, node: nodes.Expr) -> nodes.Node:
        if _is_const(node):
            return node
        self.generic_visit(node)
        return _filter(node, "_weighed" if isinstance(node, nodes.Tuple) else "_items")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        shallow = any(_is_const(side) for side in sides)
        self.generic_visit(node)
        if not shallow:
            node.expr = _filter(node.expr, "_weighed")
            for operand in node.ops:
                operand.expr = _filter(operand.expr, "_weighed")
        return node


def _is_const(node: nodes.Node) -> bool:
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(_is_const(item) for item in node.items)
    return isinstance(node, nodes.Const)


def _keep(value: Any) -> nodes.Expr:
    """An expression whose value is measured, unless it is one that is there already."""
    return value if isinstance(value, nodes.Const | nodes.Name) else _filter(value, "_kept")


def _filter(value: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)


def _chars(node: nodes.Node) -> int:
    """Characters of plain text in a part of a template."""
    return sum(len(data.data) for data in node.find_all(nodes.TemplateData))


# What the changed tree calls


def _output(value: Any) -> Any:
    budget = thread.budget
    if type(value) is str:
        budget.left -= 1 + (len(value) >> 8)
        if budget.left < 0:
            budget.spend(0)
    else:
        budget.weigh(value)
    return value


def _kept(value: Any) -> Any:
    kind = type(value)
    if kind is not bool and kind is not int:
        budget = thread.budget
        if isinstance(value, Namespace):
            budget.weigh(value)
        else:
            budget.size(value)
    return value


def _items(value: Any) -> Any:
    """A list or dict that was just made: each item may be a text that was."""
    budget = thread.budget
    for item in value.values() if isinstance(value, dict) else value:
        budget.size(item)
    return value


def _add(first: Any, *others: Any) -> Any:
    budget = thread.budget
    try:
        chars = len(first) + sum(map(len, others))
    except TypeError:  # numbers, or what cannot be added
        chars = 0
    budget.make(chars)
    for other in others:
        first = first + other
    return first


def _concat(*parts: Any) -> str:
    budget = thread.budget
    for part in parts:
        if type(part) is not str:
            budget.weigh(part)
    texts = [part if type(part) is str else str(part) for part in parts]
    budget.make(sum(map(len, texts)))
    return "".join(texts)


class _Counted:
    """What a loop goes over: its items are counted, and its length is as it was."""

    __slots__ = ("chars", "items")

    def __init__(self, items: Any, chars: int) -> None:
        self.items, self.chars = items, chars

    def __iter__(self) -> Iterator[Any]:
        return thread.budget.counted(self.items, self.chars)

    def __len__(self) -> int:
        return len(self.items)


def _counted(items: Any, chars: int) -> Any:
    return _Counted(items, chars) if hasattr(items, "__len__") else thread.budget.counted(items, chars)


def _sized(value: Any) -> Any:
    thread.budget.size(value)
    return value


def _weighed(value: Any) -> Any:
    budget = thread.budget
    if type(value) is str or type(value) is int:
        budget.spend(1)
    else:
        budget.weigh(value)
    return value


# Filters, operators and methods


def _charged(name: str, function: Any) -> Callable[..., Any]:
    """A filter or a test that spends for what it is given and for what it makes."""
    skipped = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0
    shallow = name in _SHALLOW
    if name in _LINEAR:
        return _linear(function)

    @wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        budget = thread.budget
        given = args[skipped:]
        if name == "join" and given:
            given = (list(budget.counted(given[0])), *given[1:])
            args = (*args[:skipped], *given)
        for value in given:
            if shallow or id(value) in budget.plain:
                budget.size(value)
            elif type(value) is str:
                budget.make(len(value))
            else:
                budget.weigh(value)
        _check_filter(budget, name, given, kwargs)
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return budget.counted(result)
        budget.size(result)
        return result

    return charged


def _linear(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def charged(value: Any, *args: Any) -> Any:
        budget = thread.budget
        if type(value) is str:
            budget.left -= 1 + (len(value) >> 7)
            if budget.left < 0:
                budget.spend(0)
        else:
            budget.weigh(value)
        return function(value, *args)

    return charged


def _check_filter(budget: Budget, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what would make too much, before it does."""
    options = (*args[1:], *kwargs.values())
    if name in _WIDE:
        for option in options:
            check_width(option)
    if name == "indent":
        width = next((o for o in options if isinstance(o, int | str)), 4)
        budget.make(len(str(args[0])) + str(args[0]).count("\n") * (len(width) if isinstance(width, str) else width))
    elif name == "tojson":
        longest = max((o if isinstance(o, int) else len(str(o)) for o in options), default=0)
        if longest > 32:
            raise TemplateLimitError("asked tojson for an indent or separators of more than 32 characters")
    elif name == "format":
        _check_operands(budget, "%", str(args[0]), (*args[1:], *kwargs.values()))
    elif name == "join":
        separator = kwargs.get("d", args[1] if len(args) > 1 else "")
        budget.make(len(str(separator)) * len(args[0]))
    elif name == "replace" and len(args) > 2:
        _check_replace(budget, str(args[0]), str(args[1]), str(args[2]))


def _check_replace(budget: Budget, text: Any, old: Any, new: Any) -> None:
    budget.make(len(text) + text.count(old) * len(new))


def _check_operands(budget: Budget, operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, str | bytes):
        text = left if isinstance(left, str) else left.decode("latin-1")
        if _WIDE_PERCENT.search(text):
            raise TemplateLimitError(f"asked for a format wider than {MAX_WIDTH - 1}")
        before = budget.left
        budget.weigh(right)
        budget.make(len(left) + ((before - budget.left) << 8) * text.count("%"))
    elif operator == "*":
        _check_product(budget, left, right)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(right, 0))
    budget.spend(1)


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise TemplateLimitError(f"made a number of more than {_MAX_BITS} bits")


def _check_product(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
        return
    for items, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(items, str | bytes):
            budget.make(len(items) * max(times, 0))
        elif isinstance(times, int) and isinstance(items, list | tuple):
            budget.spend(len(items) * max(times, 0))


def _check_method(budget: Budget, text: Any, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuse a method of a text that would make too much; its arguments, which it may have had to look at."""
    budget.make(len(text))
    if name in _PADDING and args:
        check_width(args[0])
    elif name == "replace" and len(args) > 1:
        _check_replace(budget, text, args[0], args[1])
    elif name == "join" and args:
        items = list(budget.counted(args[0]))
        budget.make(len(text) * len(items) + sum(len(item) for item in items if isinstance(item, str | bytes)))
        return (items, *args[1:])
    return args


def _checked_format(text: str, function: Callable[..., str]) -> Callable[..., str]:
    """``str.format`` that looks at its widths and at what it is given before it makes anything."""

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> str:
        budget = thread.budget
        fields = [field for field in Formatter().parse(text) if field[1] is not None]
        for _, _, spec, _ in fields:
            if spec and ("{" in spec or re.search(r"\d{4}", spec)):
                raise TemplateLimitError(
                    f"asked for a format wider than {MAX_WIDTH - 1}, or one that is made as it goes"
                )
        before = budget.left
        budget.weigh([args, kwargs])
        budget.make(len(text) + ((before - budget.left) << 8) * len(fields))
        return function(*args, **kwargs)

    return checked

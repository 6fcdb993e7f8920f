"""Which roles a chat template knows: the words that it compares with a message's role, or makes of one.

A word may stand in a template for another reason: ``tool['function']`` makes no role of "function".
"""

import functools
import re
from collections.abc import Iterator

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

_USUAL = frozenset({"user", "assistant", "system"})
# Tags of transformers, which say what is generated and nothing about roles.
_MARKS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def knows_role(template: str, role: str) -> bool:
    """Whether a template's source names a role as one."""
    return role in _roles(template)


@functools.lru_cache(maxsize=16)
def _roles(template: str) -> frozenset[str]:
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(_MARKS.sub("", template))
    except TemplateError:  # which rendering says, with its place
        return frozenset()
    assigned = list(tree.find_all(nodes.Assign))
    called = {_name(found.target) for found in assigned if _is_of_role(found.node, frozenset())} - {""}
    return frozenset(role for node in _naming(tree, frozenset(called)) for role in _texts(node))


def _naming(tree: nodes.Node, called: frozenset[str]) -> Iterator[nodes.Node]:
    """The parts of a template that name roles.

    Args:
        tree: The template.
        called: Variables that hold a role.
    """
    for compared in tree.find_all((nodes.Compare, nodes.Test)):
        if _is_of_role(compared, called):
            yield compared
    for chosen in tree.find_all(nodes.CondExpr):
        if _is_of_role(chosen.test, called):
            yield from (part for part in (chosen.expr1, chosen.expr2) if isinstance(part, nodes.Const))
    for assigned in tree.find_all(nodes.Assign):
        if "role" in _name(assigned.target).lower():
            yield assigned.node
    for sifted in tree.find_all(nodes.Filter):
        if any(isinstance(argument, nodes.Const) and argument.value == "role" for argument in sifted.args):
            yield from sifted.args
    for several in tree.find_all((nodes.List, nodes.Tuple)):
        if not _USUAL.isdisjoint(_texts(several)):
            yield several
    for words in tree.find_all(nodes.Dict):
        keys = [pair.key for pair in words.items]
        if any(isinstance(key, nodes.Const) and key.value in _USUAL for key in keys):
            yield from keys


def _is_of_role(node: nodes.Node, called: frozenset[str]) -> bool:
    """Whether an expression speaks of a message's role."""
    return any("role" in name.lower() or name in called for name in _names(node))


def _names(node: nodes.Node) -> Iterator[str]:
    """The variables, attributes and keys in an expression."""
    for found in (node, *node.find_all((nodes.Name, nodes.Getattr, nodes.Const, nodes.NSRef))):
        if isinstance(found, nodes.Name | nodes.NSRef):
            yield _name(found)
        elif isinstance(found, nodes.Getattr):
            yield found.attr
        elif isinstance(found, nodes.Const) and found.value == "role":
            yield "role"


def _name(target: nodes.Node) -> str:
    """A variable's name; empty for what is none."""
    if isinstance(target, nodes.NSRef):
        return target.attr
    return target.name if isinstance(target, nodes.Name) else ""


def _texts(node: nodes.Node) -> Iterator[str]:
    """The texts in an expression, without the keys by which it takes a value from another."""
    if isinstance(node, nodes.Const):
        if isinstance(node.value, str):
            yield node.value
        return
    for field, child in ((name, value) for name, value in node.iter_fields()):
        if isinstance(node, nodes.Getitem) and field == "arg":
            continue
        for part in child if isinstance(child, list) else [child]:
            if isinstance(part, nodes.Node):
                yield from _texts(part)

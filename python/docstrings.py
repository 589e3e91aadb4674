"""Makes docs.h of _quire.pyi, which is the home of what the extension module's functions take and say.

    docstrings.py STUB HEADER

The header has, in namespace quire::python::docs: `name` (the docstring of a function or class; of a class's members
`Class_name`), which for the functions of OPS begins with a signature that inspect reads, and `name_names`, the names of
their parameters in order.
"""

import ast
import sys

OPS = {
    "reshape_and_cache",
    "unified_attention",
    "run_unified_attention",
    "problem_of",
    "merge_attn_states",
    "hadamard",
    "turboquant_store",
    "turboquant_decode_attention",
}


def literal(text):
    """Text as C++ string literals, one a line."""
    lines = text.split("\n")
    pieces = [line + ("\n" if i + 1 < len(lines) else "") for i, line in enumerate(lines)]
    escaped = (p.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for p in pieces)
    return "\n    ".join(f'"{p}"' for p in escaped)


def parameters(function):
    """The signature as __text_signature__ wants it: names and defaults, no annotations."""
    arguments = function.args
    positional = [a.arg for a in arguments.args]
    keyword = [
        a.arg + ("" if d is None else f"={ast.unparse(d)}") for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)
    ]
    return ", ".join(["$module", *positional, *(["*", *keyword] if keyword else [])])


def main(stub, header):
    with open(stub) as file:
        tree = ast.parse(file.read())
    out = [
        f"// Made of {stub.rsplit('/', 1)[-1]} by docstrings.py.",
        "#pragma once",
        "",
        "#include <string_view>",
        "",
        "namespace quire::python::docs {",
        "",
    ]

    def emit(name, node, prefix=""):
        doc = ast.get_docstring(node) or ""
        out.append(f"inline constexpr const char {name}[] =\n    {literal(prefix + doc)};")

    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            is_op = node.name in OPS
            emit(node.name, node, f"{node.name}({parameters(node)})\n--\n\n" if is_op else "")
            if is_op:
                quoted = ", ".join(f'"{a.arg}"' for a in [*node.args.args, *node.args.kwonlyargs])
                out.append(f"inline constexpr std::string_view {node.name}_names[] = {{{quoted}}};")
        elif isinstance(node, ast.ClassDef):
            emit(node.name, node)
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    emit(f"{node.name}_{member.name}", member)
    out += ["", "}  // namespace quire::python::docs", ""]
    with open(header, "w") as file:
        file.write("\n".join(out))


if __name__ == "__main__":
    main(*sys.argv[1:])

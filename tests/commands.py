"Commands as a terminal runs them"

def command(name, pos='data'):
    "Code for `python -c` that runs `fastattn-{name}`, whose positional argument is `pos`, with the arguments that follow"
    return f"import sys; from fastattn.recipes.{name} import {name}; from fastcore.script import _run_cli; sys.argv[0]='fastattn-{name}'; sys.exit(_run_cli({name}.__wrapped__, False, ['{pos}']))"

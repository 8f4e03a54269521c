"Commands as a terminal runs them"

def command(name, pos='data'):
    "Code for `python -c` that runs `fastattn-{name}`; `pos` is the positional argument of the leaderboard's"
    if name=='train': return "import sys; from fastattn.recipes.train import main; sys.exit(main())"
    return f"import sys; from fastattn.recipes.{name} import {name}; from fastcore.script import _run_cli; sys.argv[0]='fastattn-{name}'; sys.exit(_run_cli({name}.__wrapped__, False, ['{pos}']))"

from readme import fn,readme

def test_readme(): assert fn.read_text(encoding='utf-8') == readme()

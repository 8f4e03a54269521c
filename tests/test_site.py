"The docs site: what its pages point to is there, nothing comes from elsewhere, and it is legible on a phone and in the dark"
import ast,builtins,functools,importlib,inspect,json,re,shutil,subprocess,symtable,sys,threading
import pytest
from html import unescape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler,ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote,unquote,urldefrag,urljoin,urlsplit
from IPython.core.inputtransformer2 import TransformerManager
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import nb_test_cells
from nbdev.process import NBProcessor
from fastcore.nbio import dict2nb,mk_cell
from fastcore.script import anno_parser
from fastattn.bench import bench
from fastattn.learner import ssa_learner
from fastattn.recipes.data import digits_dls
from fastattn.recipes.leaderboard import leaderboard
from fastattn.recipes.run import Run
from fastattn.recipes.train import make_parser as train_parser
from symbols import Symbol,Signature,add_symbols,begin_page,fold_exports,run_symbols,starts,target

cfg = get_config(__file__)
root = cfg.config_path
browser = shutil.which('chromium') or shutil.which('google-chrome')
in_browser = pytest.mark.skipif(not browser, reason='no chromium here')
loads = {'img':'src', 'script':'src', 'iframe':'src', 'source':'src', 'video':'src', 'audio':'src', 'link':'href'}

class Page(HTMLParser):
    "`links`, `loaded` (what the page needs to be shown), `ids`, the `text` outside of code, and the names whose source is `folded`"
    def __init__(self, path):
        super().__init__()
        self.links,self.loaded,self.ids,self.text,self.folded,self.code = [],[],set(),[],[],0
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.update(attrs[o] for o in ('id','name') if attrs.get(o))
        if tag in ('pre','code','script','style'): self.code += 1
        if tag=='a' and 'href' in attrs: self.links.append(attrs['href'])
        if loads.get(tag) in attrs: (self.links if attrs.get('rel') in ('index','search','next','prev') else self.loaded).append(attrs[loads[tag]])

    def handle_endtag(self, tag):
        if tag in ('pre','code','script','style'): self.code -= 1

    def handle_data(self, data):
        if not self.code: self.text.append(data)
        if data.startswith('Source: '): self.folded.append(data.removeprefix('Source: '))

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The folder of the site, built where it is not there"
    if (html := root/'_docs/html').exists(): return html
    html = tmp_path_factory.mktemp('docs')/'html'
    subprocess.run([Path(sys.executable).with_name('sphinx-build'), '-q', '-c', 'docs', 'nbs', html], cwd=root, check=True)
    return html

@pytest.fixture(scope='session')
def pages(site): return {p.relative_to(site).as_posix(): Page(p) for p in sorted(site.rglob('*.html'))}

def broken(site, pages):
    "How many links inside the site there are, and those (page, link) that lead nowhere"
    n,bad = 0,[]
    for name,page in pages.items():
        for link in page.links+page.loaded:
            if urlsplit(link).scheme or link.startswith('//'): continue
            n += 1
            to,anchor = urldefrag(urljoin(name, link))
            to = unquote(urlsplit(to).path)
            if not (site/to).is_file() or anchor and to in pages and unquote(anchor) not in pages[to].ids: bad.append((name,link))
    return n,bad

def test_links(site, pages):
    n,bad = broken(site, pages)
    print(f'{n} links on {len(pages)} pages')
    assert not bad and n>1000 and {'index.html','search.html','layers/00_simple.html'}<=set(pages)

def test_broken_links_are_seen(tmp_path):
    (tmp_path/'a.html').write_text('<a href="#b">b</a><a href="#c">c</a><a href="a.html?x=1#b"></a><p id="b"><a href="d.html"></a><img src="e.png"><a href="https://x.org"></a>')
    assert broken(tmp_path, {'a.html': Page(tmp_path/'a.html')})==(5, [('a.html','#c'),('a.html','d.html'),('a.html','e.png')])

def test_nothing_from_elsewhere(site, pages):
    "Nor from style sheets; and no Markdown is left as it was written"
    assert not [(name,o) for name,page in pages.items() for o in page.loaded if urlsplit(o).scheme not in ('','data') or o.startswith('//')]
    for p in site.rglob('*.css'): assert not re.search(r'(?:@import|url\()\s*["\']?(?:https?:)?//', p.read_text(encoding='utf-8')),p
    assert not [(name,o) for name,page in pages.items() for o in page.text if '](' in o or '{ref}' in o]

def test_search_index(site):
    index = (site/'searchindex.js').read_text(encoding='utf-8')
    index = json.loads(index[len('Search.setIndex('):index.rindex(')')])
    found = [index[o].get('simpleselfattent', []) for o in ('terms','titleterms')] # as the stemmer has it
    assert {'layers/00_simple','index'}<={index['docnames'][i] for o in found for i in ([o] if isinstance(o, int) else o)}

# In Chromium: one page that holds every other in a frame as wide as a phone, first as it is, then dark

measure = '''<body><pre id="measured"></pre><script>
const names = %s, rgba = s => {const o = s.match(/[\\d.]+/g).map(Number); return o.length<4 ? [...o, 1] : o}
const over = (c, bg) => c.slice(0, 3).map((o, i) => o*c[3]+bg[i]*(1-c[3]))
const light = c => c.map(o => (o/=255)<=0.04045 ? o/12.92 : ((o+0.055)/1.055)**2.4).reduce((s, o, i) => s+o*[0.2126,0.7152,0.0722][i], 0)
const behind = (e, w) => {const c = rgba(w.getComputedStyle(e).backgroundColor); return c[3]==1 || !e.parentElement ? c.slice(0, 3) : over(c, behind(e.parentElement, w))}
function contrasts(w) { // of every element with text of its own: its contrast to what is behind it
  return [...w.document.querySelectorAll('article *')].filter(e => e.getClientRects().length && [...e.childNodes].some(o => o.nodeType==3 && o.data.trim())).map(e => {
    const bg = behind(e, w), [a,b] = [light(over(rgba(w.getComputedStyle(e).color), bg)), light(bg)]
    return {text: e.tagName+' '+e.textContent.slice(0, 30), ratio: (Math.max(a, b)+0.05)/(Math.min(a, b)+0.05)} })
}
function least(w) { return contrasts(w).reduce((a, b) => a.ratio<b.ratio ? a : b, {text: '', ratio: 21}) }
const inside = e => e.tagName!='ARTICLE' && (['auto','scroll'].includes(getComputedStyle(e).overflowX) || inside(e.parentElement)) // of what scrolls by itself
const lost = d => [...d.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right>d.documentElement.clientWidth+1 && !inside(e.parentElement)).map(e => e.outerHTML.slice(0, 80))
for (const n of names) { const f = document.createElement('iframe'); f.src = n; f.width = 360; f.height = 740; document.body.append(f) }
window.onload = () => { const res = {}
  document.querySelectorAll('iframe').forEach((f, i) => { const w = f.contentWindow, d = w.document
    const seen = {width: w.innerWidth, has: d.documentElement.clientWidth, needs: d.documentElement.scrollWidth, lost: lost(d), light: least(w), images: [...d.images].filter(o => !o.naturalWidth).length}
    d.body.dataset.theme = 'dark'
    res[names[i]] = {...seen, dark: least(w), back: light(rgba(w.getComputedStyle(d.body).backgroundColor).slice(0, 3))} })
  document.getElementById('measured').textContent = JSON.stringify(res) }
</script>'''

class Served(SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path!='/measure': return super().do_GET()
        names = [p.relative_to(self.directory).as_posix() for p in sorted(Path(self.directory).rglob('*.html'))]
        self.send_response(200)
        self.send_header('Content-Type', 'text/html; charset=utf-8')
        self.end_headers()
        self.wfile.write((measure%json.dumps(names)).encode())
    def log_message(self, *args): pass

@pytest.fixture(scope='session')
def shown(site, tmp_path_factory):
    "Address -> its DOM and what the browser's console says; other hosts are not to be reached"
    server = ThreadingHTTPServer(('127.0.0.1',0), functools.partial(Served, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = ['--headless','--no-sandbox','--disable-gpu','--disable-quic','--no-first-run','--disable-background-networking','--disable-component-update','--disable-sync',
        '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1','--enable-logging=stderr','--virtual-time-budget=20000','--dump-dom']
    def show(address):
        p = subprocess.run([browser, *flags, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", f'http://127.0.0.1:{server.server_port}/{address}'],
            capture_output=True, text=True, timeout=300, check=True)
        return p.stdout,[o for o in p.stderr.splitlines() if 'CONSOLE' in o]
    yield show
    server.shutdown()

@pytest.fixture(scope='session')
def measured(shown):
    dom,console = shown('measure')
    return json.loads(unescape(re.search(r'<pre id="measured">(.*?)</pre>', dom, re.S)[1])),console

@in_browser
def test_search(shown):
    dom,console = shown('search.html?q=SimpleSelfAttention')
    found = re.search('<ul[^>]* class="search">(.*?)</ul>', dom, re.S)[1]
    assert 'href="layers/00_simple.html"' in found and not console

questions = {'own images': 'howto', 'train on my own images': 'howto', 'pretrained': 'howto', 'which stage': 'howto', 'resume': 'howto', 'several GPUs': 'howto', 'what the model looks at': 'howto', 'export': 'howto',
    'share a model': 'howto', 'leaderboard': 'howto', 'how sure': 'howto', 'uncertainty': 'howto', 'my own layer': 'howto', 'own Learner': 'howto', 'find out whether it helped': 'howto', 'no-resume': 'commands', 'dry-run': 'commands', 'peak_mem_mb': 'commands'}

@in_browser
def test_search_in_the_words_of_users(shown):
    missed = {}
    for question,page in questions.items():
        dom,_ = shown('search.html?q='+quote(question))
        found = re.findall('href="([^"#?]*)[^"]*"', re.search('<ul[^>]* class="search">(.*?)</ul>', dom, re.S)[1])
        if f'{page}.html' not in list(dict.fromkeys(found))[:3]: missed[question] = found[:5]
    assert not missed

@in_browser
def test_console(measured, pages):
    "On no page does a script fail, or a picture"
    by_page,console = measured
    assert set(by_page)==set(pages) and not console and not any(o['images'] for o in by_page.values())

@in_browser
def test_phone(measured):
    "At a width of 360 pixels no page scrolls sideways, and nothing lies beyond the edge where one cannot scroll to it"
    assert {o['width'] for o in measured[0].values()}=={360}
    assert not {k:(o['needs'],o['lost']) for k,o in measured[0].items() if o['needs']>o['has'] or o['lost']}

@in_browser
def test_legible(measured):
    "Light and dark, all text stands out from what is behind it"
    for theme in ('light','dark'): assert not {k:o[theme] for k,o in measured[0].items() if o[theme]['ratio']<3}
    assert max(o['back'] for o in measured[0].values())<0.1 # dark it was

# What a reader sees can be pasted: it needs nothing of the cells that the site hides

hidden = ['default_exp','echo','export','exporti','hide']

def visible(path): return [TransformerManager().transform_cell(o.source) for o in nb_test_cells(path, skip_flags=hidden)]

def scopes(table):
    yield table
    for o in table.get_children(): yield from scopes(o)

def starred(source):
    "Names that the star imports of `source` bring"
    for o in ast.walk(ast.parse(source)):
        if not isinstance(o, ast.ImportFrom) or o.names[0].name!='*': continue
        module = importlib.import_module(o.module)
        yield from getattr(module, '__all__', [k for k in vars(module) if k[0]!='_'])

def undefined(cells):
    "Names that one of `cells` reads, and that neither it nor those before it define"
    known,missing = {*dir(builtins),'display','get_ipython','__name__'},set()
    for source in cells:
        top = symtable.symtable(source, 'cell', 'exec')
        known.update(o.get_name() for o in top.get_symbols() if o.is_assigned() or o.is_imported())
        known.update(starred(source))
        for scope in scopes(top): missing.update(o.get_name() for o in scope.get_symbols() if o.is_referenced() and (scope is top or o.is_global()) and o.get_name() not in known)
    return missing

def test_undefined():
    defined = ['from pathlib import *\nimport os.path', 'x = 1', 'def f(y): return x+y', 'class A:\n    z = Path\n    w = [z for z in range(f(2))]', 'A().w,os,print']
    assert not undefined(defined)
    assert undefined(defined[1:])=={'Path','os'}
    assert undefined(['def f(): return lambda: x', 'x = 1', 'import torch.nn as nn', 'torch.ones(1)'])=={'x','torch'}

def test_visible_cells_need_no_hidden_ones():
    missing = {p.relative_to(cfg.nbs_path).as_posix(): undefined(visible(p)) for p in nbglob(cfg.nbs_path, as_path=True)}
    assert len(missing)>30 and not {k:o for k,o in missing.items() if o}

@pytest.mark.parametrize('page', ['00_core','layers/00_tensor','layers/06_local2d','recipes/06_leaderboard'])
def test_visible_cells_run_alone(page, monkeypatch):
    path,names = (cfg.nbs_path/page).with_suffix('.ipynb'),{'__name__': '__main__'}
    monkeypatch.chdir(path.parent)
    for source in visible(path): exec(compile(source, page, 'exec'), names)

# What is shown of a symbol

def rendered(obj, **kwargs): return Symbol(obj, **kwargs)._repr_markdown_()

def resize(
    *grid:int, # Sizes
    stages=1, # A stage, or several
    p:float|None=None, # A share
    act=None, # An activation
    **kwargs # Of the model
)->list: # What comes out
    "Sizes of `*grid`, of *grid, for 3$"

def test_signature():
    "No type is guessed from a default, and each comment stands where it was written"
    assert str(Signature(resize))=='''def resize(
    *grid:int, # Sizes
    stages=1, # A stage, or several
    p:float | None=None, # A share
    act=None, # An activation
    **kwargs, # Of the model
)->list: # What comes out'''

def test_docstring_is_no_italics(): assert rendered(resize).splitlines()[-1]=='Sizes of `*grid`, of \\*grid, for 3\\$'

class Base:
    def __init__(self,
        n:int, # Channels
        **kwargs # Further
    ): "Of the base"
    def forward(self, x): "Of the base"

class Layer(Base):
    "A layer"
    def forward(self,
        x:list # (B, C, N)
    )->list: # (B, C)
        return x
    @property
    def size(self): "How many"
    @classmethod
    def empty(cls, n=1): "Of nothing"
    def quiet(self): pass
    def _own(self): "Nobody's business"

class Fault(ValueError): "A fault"

def test_class():
    "Says `class`, and shows the public methods that have a docstring, and `forward`"
    text = rendered(Layer)
    assert 'class Layer(\n    n:int, # Channels\n    **kwargs, # Further\n)\n' in text and 'NoneType' not in text and 'Of the base' not in text
    assert re.findall('^#+ (.*)', text, re.M)==['Layer','Layer.forward','Layer.size','Layer.empty']
    assert '(layer.forward)=\n#### Layer.forward' in text and 'def forward(\n    x:list, # (B, C, N)\n)->list: # (B, C)' in text
    assert '#### Layer.size\n\nHow many' in text and 'def empty(\n    n=1\n):' in text
    assert '```python\nclass Fault(ValueError)\n```\n\nA fault' in rendered(Fault)

def commented(obj):
    "Of the parameters and the return of `obj` in the source, the first word and the comment of each line"
    lines = inspect.getsource(obj).splitlines()
    start = next((i for i,o in enumerate(lines) if re.match(r'\s+def __init__\(self,$', o)), None) if inspect.isclass(obj) else 0
    end = None if start is None else next((i for i,o in enumerate(lines) if i>=start and re.match(r'\s*\)', o)), None)
    if end is None: return []
    return [(m[1],m[2].strip()) for o in lines[start+1:end+1] if (m := re.match(r'\s*([*\w]+|\)->).*?  ?# (.*)', o))]

def test_all_signatures():
    "Of everything that is exported: comments stand beside their parameters, classes are classes, and nothing is of type None"
    checked = 0
    for path in (cfg.config_path/cfg.lib_path).rglob('*.py'):
        if path.name in ('__init__.py','all.py','_modidx.py'): continue
        module = importlib.import_module('.'.join(path.relative_to(cfg.config_path).with_suffix('').parts))
        for obj in [vars(module)[o] for o in module.__all__]:
            if not (inspect.isfunction(obj) or inspect.isclass(obj)) or obj.__module__!=module.__name__: continue
            text = str(Signature(obj))
            lines = [(m[1],m[2]) for o in text.splitlines() if (m := re.match(r'\s*([*\w]+|\)->).*?# (.*)', o))]
            for word,comment in commented(obj): assert (word,comment) in lines, (obj,word,comment,text)
            checked += len(commented(obj))
            assert 'NoneType' not in text and text.startswith('class' if inspect.isclass(obj) else 'def'), text
    assert checked>400

def test_source_is_folded():
    "Symbols of a cell in their order, then its source; private definitions too; imports and hidden cells go"
    nb = dict2nb(dict(cells=[mk_cell(o) for o in ['#| export\nimport re', '#| export\ndef b(): pass\ndef a(): pass', '#| export\ndef _c(): pass', '#| exporti\ndef f(): pass', '#| hide\nd = 1', 'e = 1']], metadata={}, nbformat=4, nbformat_minor=5))
    proc = NBProcessor(nb=nb, procs=[add_symbols,fold_exports])
    proc.process()
    cells = [(o.source,o.metadata.get('mystnb', {}).get('code_prompt_show')) for o in proc.nb.cells]
    assert cells==[('show_doc(b)',None), ('show_doc(a)',None), ('def b(): pass\ndef a(): pass','Source: b, a'), ('(_c)=',None), ('def _c(): pass','Source: _c'),
        ('(f)=',None), ('def f(): pass','Source: f'), ('e = 1',None)]

def test_one_page_has_the_target():
    "Of several pages, and of names that differ by capitals, the first; a page that is built again keeps its own"
    nb = dict2nb(dict(cells=[mk_cell('1')], metadata={}, nbformat=4, nbformat_minor=5))
    labels = {'_label': ('models/a','_label'), 'b': ('models/b','b')}
    begin_page('models/a', nb, labels)
    assert [target(o) for o in ('_label','b','Drop','drop','Drop')]==[['(_label)='],[],['(drop)='],[],['(drop)=']]
    begin_page('models/c', nb, labels)
    assert [target(o) for o in ('_label','drop')]==[[],['(drop)=']]

def test_imports_are_run_alone():
    "A cell of imports and other code does not stop the build"
    nb = dict2nb(dict(cells=[mk_cell(o) for o in ['#| export\ndef a(x=1): pass', 'import math\nwhat_is_not_defined', 'show_doc(a)', 'show_doc(math.ceil)']], metadata={}, nbformat=4, nbformat_minor=5))
    proc = NBProcessor(nb=nb, procs=[add_symbols,run_symbols])
    proc.process()
    assert not proc.nb.cells[1].outputs and all('text/markdown' in o.outputs[0].data for o in proc.nb.cells[2:] if 'show_doc' in o.source)

def test_where_symbols_start(): assert starts('import re\n@f\nclass A:\n    def b(self): pass\n@patch\ndef c(self:A): pass\nD = 1')=={'A': 3, 'A.b': 4, 'A.c': 6, 'D': 7}

def test_sources(pages):
    "Beside each symbol is a link to its line, and its source stands folded on its page"
    for path in nbglob(cfg.nbs_path, as_path=True):
        page = pages[path.relative_to(cfg.nbs_path).with_suffix('.html').as_posix()]
        cells = [o for o in NBProcessor(path, rm_directives=False).nb.cells if 'export' in getattr(o, 'directives_', {})]
        names = {o.name for cell in cells for o in cell.parsed_() if isinstance(o, (ast.FunctionDef,ast.ClassDef)) and not o.decorator_list}
        folded = {o for text in page.folded for o in text.split(', ')}
        assert names<=folded and (not names or any('source/fastattn/' in o for o in page.links)), (path,names-folded)

# Commands and files

def said_of_commands():
    "The text of that page, with its tables of options as it computes them"
    names,text = {},[]
    for cell in NBProcessor(cfg.nbs_path/'commands.ipynb').nb.cells:
        if cell.cell_type!='code': text.append(cell.source)
        elif 'echo' in cell.directives_: text.append(eval(cell.source, names).data)
        else: exec(cell.source, names)
    return '\n'.join(text)

def test_every_option_is_explained():
    text,parsers = said_of_commands(),[train_parser(['--arch',o,'--help-all']) for o in ('xresnet18','resnet50','projection','dropconnect','positional','nonlinear')]
    parsers += [anno_parser(leaderboard.__wrapped__, pos=['out']),anno_parser(bench.__wrapped__, pos=['what'])]
    options = {o for p in parsers for o in re.findall(r'(?<![\w-])--[a-z][\w-]*', p.format_help())}
    assert {'--no-resume','--stages','--until','--published','--quick'}<=options
    assert not [o for o in sorted(options) if not re.search(f'{o}(?![\\w-])', text)]
    assert ':bool' not in text and 'default: True' not in text
    assert not [o for o in text.splitlines() if re.match(r'\| `-.*\| *\|$', o)] # each says something

def test_every_field_of_a_run_is_explained(tmp_path):
    text = said_of_commands()
    told = set(re.findall(r'^\| `([a-z]\w*)`', text, re.M))
    def build(): return ssa_learner(digits_dls(8), widen=0.1)
    done = Run(tmp_path/'a.json', 'a', 0, {}, build, lambda learn: learn.fit(1)).train()
    failed = Run(tmp_path/'b.json', 'b', 0, {}, build, lambda learn: 1/0).train()
    committed = [json.loads(p.read_text()) for p in sorted((cfg.nbs_path/'runs').rglob('seed0.json'))]
    fields = {k for o in (done,failed,*committed) for k in o}
    rows = {k for o in (done,*committed) for row in o['epochs'] for k in row}
    assert {'gains','spans'}<=rows and not (fields|rows)-told
    assert told-fields-rows=={'p','protocol'} # of a schedule that no file has; another file

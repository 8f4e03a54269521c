"Sphinx reads nbs/ as it stands; nbdev's processors run over each notebook as it is read"
import os,re,sys
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import bigdelimiters,tex2mathml
from fastcore.nbio import mk_cell,nb2str,read_nb
from nbdev import showdoc
from nbdev.config import get_config
from nbdev.processors import FilterDefaults
from sphinx.util.logging import getLogger
sys.path.insert(0, os.path.dirname(__file__))
from symbols import Symbol,add_symbols,begin_page,fold_exports,run_symbols,source_pages

os.environ['IN_TEST'] = '1'
cfg = get_config(__file__)
project = html_title = cfg.lib_name
version = cfg.version
extensions = ['myst_nb']
myst_enable_extensions = ['amsmath', 'dollarmath']
nb_execution_mode = 'off'
nb_render_markdown_format = 'myst'
exclude_patterns = ['_*', '**/.*']
suppress_warnings = ['myst.header']
html_theme = 'furo'
html_static_path = ['static']
html_css_files = ['site.css']
html_search_scorer = os.path.join(os.path.dirname(__file__), 'scorer.js')
html_math_renderer = 'mathml'
html_show_copyright = html_show_sphinx = html_copy_source = False
groups = {'Use': 'howto\ncommands', 'Tutorials': 'tutorials/*', 'Layers': 'layers/*', 'Models': 'models/*', 'Learners': '02_learner\n01_callback\n04_interpret',
    'Recipes': 'recipes/*', 'More': 'evidence\ngpu\n03_bench\n00_core\nchangelog'}
toctree = '\n\n'.join(f'```{{toctree}}\n:hidden:\n:glob:\n:caption: {k}\n\n{v}\n```' for k,v in groups.items())
bigdelimiters.update(big=1, Big=2, bigg=3, Bigg=4) # docutils knows \bigl, and not \big
doc_link = re.compile(r'\(' + re.escape(cfg.doc_host + cfg.doc_baseurl.rstrip('/')) + r'/[^)\s]*\.html#([^)\s]+)\)')

symbol = r'\[(`[^`]+`)\]\([^)]*\)'
nested = re.compile(rf'\[([^\[\]]*(?:{symbol}[^\[\]]*)+)\]\(') # symbols linked inside the text of a link: the outer link holds
def outer(m): return '['+re.sub(symbol, r'\1', m[1])+']('

def referred(text): return nested.sub(outer, doc_link.sub(r'(#\1)', text))

def to_myst(cell):
    "`show_doc` as Markdown, links to symbols as references, no directives"
    if cell.cell_type=='code':
        mds = [o.data['text/markdown'] for o in cell.outputs if 'text/markdown' in o.get('data',{})]
        if cell.source.lstrip().startswith('#| echo: false'):
            if not mds and 'show_doc(' in cell.source: raise ValueError(f'no docs of a symbol come of {cell.source}')
            cell.cell_type,cell.source = 'markdown',''.join(mds[0] if mds else '')
            for k in ('outputs','execution_count','has_sd'): cell.pop(k, None)
        else: cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    if cell.cell_type=='markdown': cell.source = referred(cell.source)
    for o in cell.get('outputs', []):
        if 'text/markdown' in o.get('data',{}): o.data['text/markdown'] = referred(''.join(o.data['text/markdown']))
    cell.metadata.pop('execution', None)

class Myst(FilterDefaults):
    def procs(self):
        ours = dict(FrontmatterProc=None, insert_warning=None, add_fold=None, mv_exports=None, add_show_docs=add_symbols, exec_show_docs=run_symbols, rm_export=fold_exports)
        return [p for o in self.base_procs() if (p := ours.get(o.__name__, o))] + [to_myst]

def read(app, docname, src):
    if (p := app.env.doc2path(docname)).suffix != '.ipynb': return
    nb = read_nb(p)
    begin_page(docname, nb, app.env.get_domain('std').anonlabels)
    Myst()(nb)
    if docname == app.config.root_doc: nb.cells.append(mk_cell(toctree, 'markdown'))
    src[0] = nb2str(nb)

def add_math(self, node, block=False):
    try: self.body.append(tex2mathml(node.astext(), as_block=block))
    except MathError as e: getLogger(__name__).warning('%s In: %s', e, node.astext(), location=node)
    raise nodes.SkipNode
def add_math_block(self, node): add_math(self, node, True)

def setup(app):
    showdoc.BasicMarkdownRenderer = Symbol
    app.connect('source-read', read)
    app.connect('html-collect-pages', source_pages)
    app.add_html_math_renderer('mathml', (add_math,None), (add_math_block,None))

"How the site shows what a notebook exports: heading, link to the source, signature, docstring, methods, and the source itself, folded"
import ast,inspect,re
from fastcore.foundation import L
from fastcore.docments import DocmentText,docments
from fastcore.nbio import mk_cell
from itertools import groupby
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.processors import add_show_docs,exec_show_docs
from nbdev.showdoc import BasicMarkdownRenderer,showdoc_nm
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

cfg = get_config(__file__)
defs = ast.FunctionDef,ast.ClassDef

def has_arguments(cls):
    "Is what `cls` is made with defined here, not in a base class of another library?"
    maker = next(o for o in cls.__mro__ if {'__init__','__new__'}&vars(o).keys())
    return maker.__module__.split('.')[0] in ('__main__',cfg.lib_name,cls.__module__)

def type_words(annotation):
    "A type as one writes it where its name is imported"
    if annotation is inspect.Parameter.empty: return annotation
    text = inspect.formatannotation(annotation).strip("'").replace('NoneType', 'None')
    return re.sub(r'\b(?:typing|collections|pathlib|fastai|fastattn)\.(?:\w+\.)*', '', text)

class Signature(DocmentText):
    "fastcore's, with `class` for a class, what is said of `**kwargs`, and no types guessed from defaults"
    def __init__(self, obj, maxline=110):
        self.obj,self.maxline,self.docstring,self.dm = obj,maxline,False,{}
        self.bare = inspect.isclass(obj) and not has_arguments(obj)
        if self.bare: return
        self.dm = docments(obj, full=True, args_kwargs=True)
        for k in ('self','cls'): self.dm.pop(k, None)
        signature = inspect.signature(obj)
        self.dm['return'].anno = type_words(signature.return_annotation)
        for k,o in signature.parameters.items():
            if k in self.dm: self.dm[k].anno = type_words(o.annotation)

    def __str__(self):
        if not inspect.isclass(self.obj): return super().__str__()
        if self.bare: return f"class {self.obj.__name__}({', '.join(o.__name__ for o in self.obj.__bases__)})"
        return re.sub('^def', 'class', super().__str__()).removesuffix(':')

def methods(cls):
    "Names of the public methods of `cls` itself that have something to say; `forward` always has"
    found = {k: getattr(o, '__func__', o) for k,o in vars(cls).items() if k[0]!='_'}
    return [k for k,o in found.items() if inspect.isroutine(o) and (o.__doc__ or k=='forward') or isinstance(o, property) and o.__doc__]

_taken = {} # label -> the name that has it on this page, None where another page has it
def target(name):
    "Where links to `name` lead. Names may differ by capitals only, as `dropconnect` does, or private ones by their page: the first has the target"
    return [f'({name.lower()})='] if _taken.setdefault(name.lower(), name)==name else []

class Symbol(BasicMarkdownRenderer):
    "`show_doc` as MyST"
    source,lines = '',{} # address of the page with the source, seen from the page that is read; where each symbol begins there

    def __init__(self, sym, *args, **kwargs):
        super().__init__(sym, *args, **kwargs)
        self.is_called = not isinstance(sym, property)

    def _repr_markdown_(self):
        parts = [*target(self.nm), f"{'#'*self.title_level} {self.nm}\n"]
        if self.nm in self.lines: parts.append(f'<a class="source" href="{self.source}#L-{self.lines[self.nm]}">source</a>\n')
        if self.is_called: parts.append(f'```python\n{Signature(self.sym)}\n```\n')
        parts.append(re.sub(r'(`[^`]*`)|([*$])', lambda m: m[1] or '\\'+m[2], self.docs))
        if inspect.isclass(self.sym):
            for o in methods(self.sym): parts.append(self.method(o))
        return '\n'.join(parts)

    def method(self, name):
        o = inspect.getattr_static(self.sym, name)
        shown = Symbol(getattr(o, '__func__', o), name=f'{self.nm}.{name}', title_level=self.title_level+1)
        shown.docs = inspect.cleandoc(o.__doc__ or '') # not that of the class it overrides
        return '\n'+shown._repr_markdown_()

def defined(statement):
    "Names that a statement of a module defines"
    if isinstance(statement, ast.Assign): return [o.id for o in statement.targets if isinstance(o, ast.Name)]
    return L(showdoc_nm(statement)) if isinstance(statement, defs) else []

def starts(source):
    "Line at which each name, and each method of a class, begins"
    lines = {}
    for o in ast.parse(source).body:
        lines.update({name: o.lineno for name in defined(o)})
        if isinstance(o, ast.ClassDef): lines.update({f'{o.name}.{m.name}': m.lineno for m in o.body if isinstance(m, defs)})
    return lines

def begin_page(docname, nb, labels):
    "`labels` are those of the pages that are read already, with their pages: of the last build, too, if they have not changed"
    _taken.clear()
    _taken.update({label: None for label,(page,*_) in labels.items() if page!=docname})
    module = re.search(r'^#\| default_exp (\S+)', '\n'.join(o.source for o in nb.cells), re.M)
    path = module and f"{cfg.lib_name}/{module[1].replace('.', '/')}"
    Symbol.source = '../'*docname.count('/')+f'source/{path}.html'
    Symbol.lines = starts((cfg.config_path/f'{path}.py').read_text(encoding='utf-8')) if module else {}

class add_symbols(add_show_docs):
    "nbdev puts a cell for a symbol right behind the exported cell: of several symbols, the last came first"
    def begin(self):
        super().begin()
        runs = [(k,list(g)) for k,g in groupby(self.nb.cells, lambda o: bool(getattr(o, 'has_sd', False)))]
        self.nb.cells = [o for added,run in runs for o in (reversed(run) if added else run)]
        for i,o in enumerate(self.nb.cells): o.idx_ = i

class run_symbols(exec_show_docs):
    "Runs what is exported and what shows it; of other cells their imports only, whatever else stands there"
    def __call__(self, cell):
        if cell.cell_type!='code': return
        if cell.directives_.keys()&{'export','exporti','exec_doc'} or 'show_doc(' in cell.source: return super().__call__(cell)
        imports = [ast.unparse(o) for o in cell.parsed_() or () if isinstance(o, (ast.Import,ast.ImportFrom))]
        if imports and cell.directives_.get('eval')!='false':
            alone = mk_cell('\n'.join(imports))
            alone.idx_ = cell.idx_
            super().__call__(alone)

def is_folded(cell):
    "Is it exported, and more than imports?"
    return cell.cell_type=='code' and bool(cell.directives_.keys()&{'export','exporti'}) and not all(isinstance(o, (ast.Import,ast.ImportFrom)) for o in cell.parsed_())

def undocumented_targets(cell):
    "Where links to what has no docs of its own lead: to the folded source"
    names = [name for o in cell.parsed_() if isinstance(o, defs) for name in defined(o)]
    return '\n'.join(o for name in names if name[0]=='_' or 'exporti' in cell.directives_ for o in target(name))

class fold_exports(Processor):
    "Exported definitions are folded, behind the docs of their symbols; what else is exported, or hidden, goes"
    hidden = {'default_exp','export','exporti','hide'}

    def begin(self):
        cells = []
        for o in self.nb.cells:
            if is_folded(o) and (there := undocumented_targets(o)): cells.append(mk_cell(there, 'markdown'))
            if getattr(o, 'has_sd', False) and cells and is_folded(cells[-1]): cells.insert(-1, o)
            else: cells.append(o)
        self.nb.cells = cells

    def cell(self, cell):
        if cell.cell_type!='code': return
        if is_folded(cell):
            names = [name for o in cell.parsed_() for name in defined(o)]
            cell.outputs = []
            cell.metadata.update(tags=['hide-input'], mystnb=dict(code_prompt_show='Source: '+', '.join(names) if names else 'Source', code_prompt_hide='Source'))
        elif cell.directives_.keys()&self.hidden: del(cell['source'])

def source_pages(app):
    "A page for each module, with an anchor at each line"
    for path in sorted((cfg.config_path/cfg.lib_path).rglob('*.py')):
        if path.name in ('__init__.py','all.py','_modidx.py'): continue
        code = highlight(path.read_text(encoding='utf-8'), PythonLexer(), HtmlFormatter(lineanchors='L'))
        name = path.relative_to(cfg.config_path).with_suffix('').as_posix()
        yield 'source/'+name,dict(title=name, body=f'<h1>{name}.py</h1>{code}'),'page.html'

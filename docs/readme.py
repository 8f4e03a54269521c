"Write README.md from the index notebook: `python docs/readme.py`"
import re
import nbformat
from fastcore.nbio import nb2str
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics,filter_stream_,hide_,hide_line,rm_export,rm_header_dash

cfg = get_config(__file__)
fn = cfg.config_path/'README.md'

def rebase(cell):
    "Relative links of the notebook, as seen from the README's folder"
    if cell.cell_type=='markdown': cell.source = re.sub(r'\]\((?![a-z]+:|[#/])', f']({cfg.nbs_path.name}/', cell.source)

def results(cell):
    "Of a cell with `#| echo: false`, what it says in Markdown, without the code that says it"
    if cell.cell_type!='code' or cell.directives_.get('echo')!='false': return
    cell.cell_type,cell.source = 'markdown','\n'.join(''.join(o.data['text/markdown']) for o in cell.outputs if 'text/markdown' in o.get('data',{}))
    for k in ('outputs','execution_count'): cell.pop(k, None)

def readme():
    p = NBProcessor(cfg.nbs_path/cfg.readme_nb, [hide_line, filter_stream_, rm_header_dash, rm_export, clean_magics, hide_, results, rebase])
    p.process()
    nb = nbformat.reads(nb2str(p.nb), as_version=4)
    nb.metadata.language_info = dict(name='python')
    return re.sub(r'\n{3,}', '\n\n', MarkdownExporter().from_notebook_node(nb)[0]).strip()+'\n'

if __name__=='__main__': fn.write_text(readme(), encoding='utf-8')

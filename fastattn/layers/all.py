from .dropconnect import *
from .local import *
from .local2d import *
from .position import *
from .positional import *
from .projection import *
from .simple import *
from .tensor import *

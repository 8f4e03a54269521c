from .simple import *
from .projection import *

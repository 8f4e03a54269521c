from .dropconnect import *
from .projection import *
from .simple import *

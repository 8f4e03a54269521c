from .simple import *

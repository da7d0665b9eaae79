"""placeholder"""
def tables(): return ""

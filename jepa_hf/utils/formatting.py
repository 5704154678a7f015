"""Numbers as console, card and report show them."""


def format_number(value: float) -> str:
    """Format with three significant digits: 0.00123, 12.3, 1,230.

    >>> [format_number(value) for value in (0.0012345, 0.5, 12.345, 384.0, 12345.0, 1e-7)]
    ['0.00123', '0.5', '12.3', '384', '12,345', '1e-07']
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_share(share: float) -> str:
    """Format a fraction as a percentage, below 10 % with two significant digits.

    >>> [format_share(share) for share in (1.0, 0.998, 0.184, 0.0019)]
    ['100 %', '100 %', '18 %', '0.19 %']
    """
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def format_parameters(count: int) -> str:
    """Format a number of parameters.

    >>> format_parameters(22_700_000), format_parameters(27_300)
    ('22.7 M parameters', '27 K parameters')
    """
    return f"{count / 1e6:.1f} M parameters" if count >= 1e5 else f"{count / 1e3:.0f} K parameters"

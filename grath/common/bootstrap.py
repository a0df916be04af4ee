"""Bootstrap over questions or pairs: means of rows drawn with replacement, and their 95 % interval."""

RESAMPLES = 2000


def bootstrap_means(values):
    """Draw as many rows as there are, with replacement, and average each column; `RESAMPLES` times.

    Args:
        values: float array (rows, columns); NaNs are left out of the means.

    Returns:
        float array (RESAMPLES, columns); NaN where all drawn values of a column are NaN.
    """
    import numpy

    count, columns = values.shape
    present, filled = ~numpy.isnan(values), numpy.nan_to_num(values)
    draw = numpy.random.default_rng(0)
    means = numpy.empty((RESAMPLES, columns))
    with numpy.errstate(invalid="ignore"):
        for i in range(RESAMPLES):
            times = numpy.bincount(draw.integers(count, size=count), minlength=count)
            means[i] = (times @ filled) / (times @ present)
    return means


def interval(values):
    """Return the 2.5 % and the 97.5 % quantile of values (array; NaNs are left out): list of two floats."""
    import numpy

    return numpy.nanquantile(values, (0.025, 0.975)).tolist()

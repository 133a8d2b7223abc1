"""Work that is done one ahead, in a thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """A function of the iteration, whose value for iteration k + 1 is worked out in a thread while k's is in use.

    The function must depend on its argument alone: what it gives is then the same in whatever order it is asked, and a
    run that was killed goes on as if it had not been. An error in the thread is raised when that value is asked for.

    >>> squares = Ahead(lambda k: k * k)
    >>> [squares(k) for k in (1, 2, 7)]
    [1, 4, 49]
    """

    def __init__(self, function: Callable[[int], T]) -> None:
        self.function = function
        self.thread = ThreadPoolExecutor(1, "ahead")
        self.waiting: tuple[int, Future[T]] | None = None

    def __call__(self, iteration: int) -> T:
        """The value of this iteration; the next one's is begun."""
        ready = self.waiting is not None and self.waiting[0] == iteration
        value = self.waiting[1].result() if ready else self.function(iteration)
        self.waiting = (iteration + 1, self.thread.submit(self.function, iteration + 1))
        return value

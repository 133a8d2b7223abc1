"""Work that is done ahead, in threads."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """A function of the iteration, whose next values are worked out in threads while this one's is in use.

    The function must depend on its argument alone: what it gives is then the same in whatever order it is asked, and a
    run that was killed goes on as if it had not been. An error in the thread is raised when that value is asked for.

    Args:
        function: of the iteration.
        depth: how many values ahead; each has a thread.
        stride: from one iteration that is asked for to the next.

    >>> squares = Ahead(lambda k: k * k)
    >>> [squares(k) for k in (1, 2, 7)]
    [1, 4, 49]
    """

    def __init__(self, function: Callable[[int], T], depth: int = 1, stride: int = 1) -> None:
        self.function, self.depth, self.stride = function, depth, stride
        self.threads = ThreadPoolExecutor(depth, "ahead")
        self.waiting: dict[int, Future[T]] = {}

    def __call__(self, iteration: int) -> T:
        """The value of this iteration; the next ones are begun."""
        ready = self.waiting.pop(iteration, None)
        value = ready.result() if ready else self.function(iteration)
        following = range(iteration + self.stride, iteration + self.depth * self.stride + 1, self.stride)
        self.waiting = {k: self.waiting.get(k) or self.threads.submit(self.function, k) for k in following}
        return value

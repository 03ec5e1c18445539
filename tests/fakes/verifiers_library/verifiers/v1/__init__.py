"""Has the two classes by which a package is told to be of the newer part."""


class Env: ...


class Taskset: ...

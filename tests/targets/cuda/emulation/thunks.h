// Appended to a preprocessed kernel file (so: no directives here). Calls a kernel with arguments taken from an array of
// pointers, and tells the harness what it expects: 100 * (0 pointer, 1 float, 2 integer, 3 struct) + width in bytes.
namespace emulator_thunks {
using size = decltype(sizeof 0);
template <size... I> struct Indices {};
template <size N, size... I> struct Count : Count<N - 1, N - 1, I...> {};
template <size... I> struct Count<0, I...> { using type = Indices<I...>; };
template <typename T, bool = __is_class(T)> struct Kind { static constexpr int value = 300 + sizeof(T); };
template <typename T> struct Kind<T, false> { static constexpr int value = (T(0.5) != T(0) ? 100 : 200) + sizeof(T); };
template <typename T> struct Kind<T*, false> { static constexpr int value = sizeof(T*); };
template <typename... A, size... I>
__attribute__((no_sanitize("thread"))) inline void run(void (*kernel)(A...), void** args, Indices<I...>) {
    kernel(*static_cast<A*>(args[I])...);
}
template <typename... A>
__attribute__((no_sanitize("thread"))) inline void call(void (*kernel)(A...), void** args) {
    run(kernel, args, typename Count<sizeof...(A)>::type{});
}
template <typename... A>
inline int kind(void (*)(A...), int i) {
    const int kinds[] = {Kind<A>::value..., -1};
    return kinds[i];
}
}

// A function by reference: what drives the loops is compiled once, and not for each of them.
#pragma once

namespace batchlab {

template <class F>
class Call;
template <class Result, class... Arguments>
class Call<Result(Arguments...)> {
 public:
  template <class F>
  Call(const F& f)
      : object_(&f),
        call_([](const void* object, Arguments... a) -> Result { return (*static_cast<const F*>(object))(a...); }) {}
  Result operator()(Arguments... a) const { return call_(object_, a...); }

 private:
  const void* object_;
  Result (*call_)(const void*, Arguments...);
};

}  // namespace batchlab

# SOURCE says what the compiler must say on a line "// expect: <regular expression>".
file(STRINGS "${SOURCE}" expect REGEX "^// expect: " LIMIT_COUNT 1)
string(REPLACE "// expect: " "" expect "${expect}")
if(expect STREQUAL "")
    message(FATAL_ERROR "${SOURCE} has no line '// expect: <regular expression>'")
endif()

set(ENV{LC_ALL} C)  # the messages in English
execute_process(COMMAND ${COMMAND} ${SOURCE} RESULT_VARIABLE result ERROR_VARIABLE messages)
if(result)
    message(FATAL_ERROR "does not compile even without the misuse:\n${messages}")
endif()
execute_process(COMMAND ${COMMAND} -DMISUSE ${SOURCE} RESULT_VARIABLE result ERROR_VARIABLE messages)
if(NOT result)
    message(FATAL_ERROR "compiles, but must not")
endif()
if(NOT messages MATCHES "error: [^\n]*${expect}")
    message(FATAL_ERROR "no error matches '${expect}':\n${messages}")
endif()

// Stylecheck checks the layout of comments and lines in Go files, which gofmt
// does not: comments on lines of their own end by column 80, trailing comments
// do not begin with a preposition, and at most 1 % of all lines go beyond
// column 100. A tab counts as four columns.
//
// usage: stylecheck FILE...
package main

import (
	"bytes"
	"fmt"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

const (
	tabWidth     = 4
	commentWidth = 80
	codeWidth    = 100
	maxLongLines = 0.01 // share of lines beyond codeWidth
)

// prepositions begin comments that only continue the code in front of them. A
// trailing comment must be understood alone.
var prepositions = []string{
	"of", "by", "with", "from", "to", "at", "on", "into", "beside", "behind", "within", "without",
}

// unbreakable matches comments that cannot be wrapped: directives, URLs and
// preformatted lines.
var unbreakable = regexp.MustCompile(`^//(go:|nolint|line |\t| {2,})|https?://`)

func main() {
	var problems []string
	var lines, long int
	for _, name := range os.Args[1:] {
		src, err := os.ReadFile(name)
		if err != nil {
			problems = append(problems, err.Error())
			continue
		}
		found, err := check(name, src)
		if err != nil {
			problems = append(problems, err.Error())
		}
		problems = append(problems, found...)
		for line := range bytes.Lines(src) {
			lines++
			if columns(strings.TrimRight(string(line), "\n")) > codeWidth {
				long++
			}
		}
	}
	if float64(long) > maxLongLines*float64(lines) {
		problems = append(problems,
			fmt.Sprintf("%d of %d lines are longer than %d columns, more than %v %%; break some of them",
				long, lines, codeWidth, 100*maxLongLines))
	}
	for _, p := range problems {
		fmt.Fprintln(os.Stderr, p)
	}
	if len(problems) > 0 {
		os.Exit(1)
	}
}

// check returns the problems of the comments in a file, each with its position.
func check(name string, src []byte) (problems []string, err error) {
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, name, src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	lines := strings.Split(string(src), "\n")
	for _, group := range file.Comments {
		for _, c := range group.List {
			at := fset.Position(c.Pos())
			line := lines[at.Line-1]
			alone := strings.TrimSpace(line[:at.Column-1]) == ""
			text := strings.TrimPrefix(c.Text, "//")
			first, _, _ := strings.Cut(strings.TrimSpace(text), " ")
			switch {
			case unbreakable.MatchString(c.Text):
			case alone && columns(line) > commentWidth:
				problems = append(problems,
					fmt.Sprintf("%v: comment beyond column %d; wrap it", at, commentWidth))
			case !alone && slices.Contains(prepositions, first):
				problems = append(problems,
					fmt.Sprintf("%v: trailing comment begins with %q; name the thing instead",
						at, first))
			}
		}
	}
	return problems, nil
}

// columns returns the width of a line in columns.
func columns(line string) int {
	return utf8.RuneCountInString(line) + (tabWidth-1)*strings.Count(line, "\t")
}

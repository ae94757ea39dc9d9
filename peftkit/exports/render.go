// Renders conversations by a Go template, as Ollama does: go run render.go JOB.json
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role, Content string
}

type job struct {
	Template      string
	Conversations [][]message
}

func main() {
	var asked job
	data, err := os.ReadFile(os.Args[1])
	if err == nil {
		err = json.Unmarshal(data, &asked)
	}
	var parsed *template.Template
	if err == nil {
		parsed, err = template.New("").Option("missingkey=zero").Parse(asked.Template)
	}
	texts := []string{}
	for _, messages := range asked.Conversations {
		var text strings.Builder
		if err == nil {
			err = parsed.Execute(&text, map[string]any{"Messages": messages, "Response": ""})
		}
		texts = append(texts, text.String())
	}
	if err != nil {
		panic(err)
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
